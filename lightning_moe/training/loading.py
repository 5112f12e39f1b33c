"""Reading order and position of the training data, so that a run resumed in the middle of an epoch reads on exactly."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from typing_extensions import override

from lightning_moe.calibration.processes import ALONE, Processes

Batch = dict[str, Tensor]


class EpochShuffle(DistributedSampler[int]):
    """A permutation that depends on the seed and the epoch alone, dealt out row by row to the processes.

    Batches of b rows in each of N processes are together the batches of b N rows of one process, in the same order.
    Every process gets the same number of rows, so up to N - 1 at the end of the permutation are left out of an epoch.
    A DistributedSampler, because Lightning puts its own in the place of any other.

    Args:
        num_rows: rows of the data.
        seed: of all permutations.
        processes: those that share the rows.
    """

    def __init__(self, *, num_rows: int, seed: int, processes: Processes = ALONE) -> None:
        rows: Any = range(num_rows)  # only its length is used
        super().__init__(rows, num_replicas=processes.size, rank=processes.rank, seed=seed)
        self.num_samples = num_rows // processes.size
        self.num_rows = num_rows

    @override
    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.num_rows, generator=generator)
        yield from order[: self.num_samples * self.num_replicas][self.rank :: self.num_replicas].tolist()


class EvenShare(Dataset[Batch]):
    """Every `size`-th row, for evaluation: nothing twice, and the same number in all processes.

    Where a process has no row left, it gets one without labels, which costs time and counts for nothing: under DDP and
    FSDP2 all processes must run the model equally often.

    Args:
        rows: all of them, with `labels`.
        processes: those that share them.
    """

    def __init__(self, rows: Dataset[Batch], *, num_rows: int, processes: Processes) -> None:
        self.rows = rows
        self.num_rows = num_rows
        self.processes = processes

    def __len__(self) -> int:
        return -(-self.num_rows // self.processes.size)

    @override
    def __getitem__(self, index: int) -> Batch:
        row = index * self.processes.size + self.processes.rank
        if row < self.num_rows:
            return self.rows[row]
        spare = self.rows[0]
        return spare | {"labels": torch.full_like(spare["labels"], -100)}

    def sampler(self) -> DistributedSampler[Batch]:
        """All of this share, in order; it keeps Lightning from dividing it again."""
        return DistributedSampler(self, num_replicas=1, rank=0, shuffle=False)


@dataclass(kw_only=True)
class ReadingPosition:
    """What was read: `num_batches` of `rows_per_batch` (of all processes together) of an epoch over `num_rows` rows.

    A resumed run starts after `skip_batches` of epoch `skip_epoch`.
    """

    epoch: int = 0
    num_batches: int = 0
    rows_per_batch: int = 0
    num_rows: int = 0
    skip_epoch: int = -1
    skip_batches: int = 0


class ResumableLoader(DataLoader[Batch]):
    """A loader that counts what it hands out in a shared position, and leaves out once what a resumed run has read.

    The position is an object of its own because Lightning rebuilds loaders (for several devices) after they were made,
    and restores a loader's own state only if nothing asked for the number of steps before.
    """

    def __init__(self, dataset: Dataset[Batch], *, position: ReadingPosition, **kwargs: Any) -> None:
        super().__init__(dataset, **kwargs)
        self.position = position

    @override
    def __iter__(self) -> Iterator[Batch]:  # pyright: ignore[reportIncompatibleMethodOverride]: a generator is enough
        """Runs at the first batch, after Lightning told the sampler its epoch."""
        position = self.position
        position.epoch = self.sampler.epoch if isinstance(self.sampler, DistributedSampler) else 0
        position.num_batches = 0
        skip = position.skip_batches if position.epoch == position.skip_epoch else 0
        position.skip_batches = 0
        for batch in super().__iter__():
            position.num_batches += 1
            if position.num_batches > skip:
                yield batch

    def state_dict(self) -> dict[str, int]:
        """Tell Lightning that this loader resumes; the data module keeps its position."""
        return {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Nothing to restore: the data module has done it before the loader was made."""
