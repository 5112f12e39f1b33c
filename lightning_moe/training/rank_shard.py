"""Shares of a data set without a length, for training in several processes."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from torch.utils.data import IterableDataset, get_worker_info
from typing_extensions import override

from lightning_moe.calibration.processes import OwnShare, Processes

ItemT = TypeVar("ItemT")


class RankShard(IterableDataset[ItemT], OwnShare):
    """A disjoint share of a stream for each process and loader worker, equally long for all.

    Lightning does not divide an IterableDataset: every process would train on all of it, and where somebody divides it
    unevenly, DDP waits for ever. Here items are dealt out in turn, and a round counts only if it is complete, which
    every process sees by itself. At most `processes * workers - 1` items at the end of the stream are left out.

        def train_dataloader(self):
            processes = Processes(rank=self.trainer.global_rank, size=self.trainer.world_size)
            return DataLoader(RankShard(stream, processes=processes), batch_size=4)

    Args:
        items: the stream, the same in every process and in the same order (shuffle it with one seed for all). It may
            be iterated again for the next epoch if it can.
        processes: those that train; to be named, since a loader's workers cannot ask for the process group.
    """

    def __init__(self, items: Iterable[ItemT], *, processes: Processes) -> None:
        super().__init__()
        self.items = items
        self.processes = processes

    @override
    def __iter__(self) -> Iterator[ItemT]:
        worker = get_worker_info()
        num_workers, worker_index = (1, 0) if worker is None else (worker.num_workers, worker.id)
        num_members = self.processes.size * num_workers
        own = worker_index * self.processes.size + self.processes.rank
        dealt: list[ItemT] = []
        for index, item in enumerate(self.items):
            if index % num_members == own:
                dealt = [item]
            if index % num_members == num_members - 1:
                yield from dealt
