"""Reading order and position of the training data, so that a run resumed in the middle of an epoch reads on exactly."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler
from typing_extensions import override

Batch = dict[str, Tensor]


class EpochShuffle(Sampler[int]):
    """A permutation that depends on the seed and the epoch alone."""

    def __init__(self, *, num_rows: int, seed: int) -> None:
        self.num_rows = num_rows
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before each epoch."""
        self.epoch = epoch

    @override
    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        yield from torch.randperm(self.num_rows, generator=generator).tolist()

    def __len__(self) -> int:
        return self.num_rows


@dataclass(kw_only=True)
class ReadingPosition:
    """What was read: `num_batches` of an epoch over `num_rows` rows.

    A resumed run starts after `skip_batches` of epoch `skip_epoch`.
    """

    epoch: int = 0
    num_batches: int = 0
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
        position.epoch = self.sampler.epoch if isinstance(self.sampler, EpochShuffle | DistributedSampler) else 0
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
