"""The processes that share a job: which one this is, its share of the batches, sums over all."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, distributed
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

ItemT = TypeVar("ItemT")


class OwnShare:
    """Marks an iterable, or the data set of a loader, of which each process reads its own share already."""


@dataclass(frozen=True, kw_only=True)
class Processes:
    """A group of processes, all of which call the same functions in the same order.

    Nothing of torch.distributed is called where there is only one.

    Args:
        rank: number of this process.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def of_default_group(cls) -> Self:
        """Those of torch.distributed's default group; this process alone where there is none."""
        if not distributed.is_available() or not distributed.is_initialized():
            return cls()
        return cls(rank=distributed.get_rank(), size=distributed.get_world_size())

    def share(self, items: Iterable[ItemT]) -> Iterable[ItemT]:
        """Every `size`-th item, from the `rank`-th on: shares are disjoint, and together they are all.

        Every process has to see the same items in the same order. What is a share already is taken whole: `OwnShare`,
        a loader over such a data set or over one that was split by node, a loader with a DistributedSampler.
        """
        return items if is_own_share(items) else islice(items, self.rank, None, self.size)

    def sum_(self, value: Tensor) -> None:
        """Adds up, in place, over the processes: any shape, the same on all."""
        self._reduce(value, distributed.ReduceOp.SUM)

    def max_(self, value: Tensor) -> None:
        """Takes the maximum, in place, over the processes: any shape, the same on all."""
        self._reduce(value, distributed.ReduceOp.MAX)

    def gather(self, value: Any) -> list[Any]:
        """Something small of every process, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """Work of each process by itself; a ValueError in one of them is raised in all, and nobody waits for it.

        Raises:
            ValueError: that of the first process that had one.
        """
        own: ValueError | None = None
        try:
            yield
        except ValueError as error:
            if self.size == 1:
                raise
            own = error
        message = next((text for text in self.gather(None if own is None else str(own)) if text is not None), None)
        if message is not None:
            raise ValueError(message) from own

    def _reduce(self, value: Tensor, operation: distributed.ReduceOp.RedOpType) -> None:
        if self.size == 1:
            return
        # NCCL knows tensors on a GPU only, and the model may be on the CPU while it is prepared.
        moved = value.cuda() if value.device.type == "cpu" and _needs_gpu() else value
        distributed.all_reduce(moved, op=operation)
        if moved is not value:
            value.copy_(moved)


ALONE = Processes()


def reduce_sums(sums: Mapping[str, Tensor], *, processes: Processes) -> None:
    """In place: quantities called `max_*` become their maximum over the processes, all others their sum."""
    for name in sorted(sums):
        (processes.max_ if name.startswith("max_") else processes.sum_)(sums[name])


def is_own_share(items: Iterable[Any]) -> bool:
    """Whether iterating gives a part that no other process gets, without our doing."""
    if not isinstance(items, DataLoader):
        return isinstance(items, OwnShare)
    if isinstance(items.dataset, OwnShare) or isinstance(items.sampler, DistributedSampler):
        return True
    return isinstance(items.dataset, IterableDataset) and _is_split_by_node(items.dataset)


def _is_split_by_node(dataset: IterableDataset[Any]) -> bool:
    """Whether `datasets.distributed.split_dataset_by_node` was applied to a streamed data set of that library."""
    from datasets import IterableDataset as StreamedDataset

    return isinstance(dataset, StreamedDataset) and dataset._distributed is not None


def _needs_gpu() -> bool:
    return torch.cuda.is_available() and distributed.get_backend() == "nccl"
