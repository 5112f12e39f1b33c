"""The plain DataLoaders of a fit, so that a resumed run goes on within their epoch.

Lightning restores loaders with a `state_dict`. A plain one draws its order when the epoch's iterator is made and when
its first batch is read: the states of the generators at both moments, and the number of batches that were trained on,
say where it was.
"""

from collections.abc import Mapping
from typing import Any, Self

import torch
from lightning import Trainer
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch.trainer.connectors.data_connector import _DataLoaderSource
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset
from typing_extensions import override

from lightning_moe.training.random_state import own_generators, random_state, set_random_state


class PlainLoaders(CombinedLoader):
    """Plain loaders that note the states their epoch began with, and can go on within it."""

    def __init__(self, iterables: Any, mode: Any) -> None:
        super().__init__(iterables, mode)
        self._noted: dict[str, Any] = {"made": None, "drawn": []}
        self._alone = True
        self._resume: tuple[Mapping[str, Any], int, Mapping[str, Any]] | None = None

    @property
    def generators(self) -> list[torch.Generator]:
        """The loaders' own."""
        return [generator for loader in self.flattened for generator in own_generators(loader)]

    @property
    def distributed(self) -> bool:
        """Whether every loader is shared out by a sampler whose order depends on the epoch alone."""
        return all(isinstance(loader.sampler, DistributedSampler) for loader in self.flattened)

    def noted(self) -> dict[str, Any] | None:
        """The states from which the running epoch's iterator was made and its orders were drawn; None before that."""
        return {"made": self._noted["made"], "drawn": list(self._noted["drawn"])} if self._noted["drawn"] else None

    @override
    def __iter__(self) -> Self:
        self._noted, self._resume = {"made": random_state(self.generators), "drawn": []}, None
        super().__iter__()
        return self

    @override
    def __next__(self) -> Any:
        if self._resume is not None:
            self._skip(*self._resume)
        iterator = self._iterator
        assert iterator is not None
        index, iterators = iterator._idx, list(iterator.iterators)
        # A loader that is shorter than another begins again, in a new order, within the epoch.
        before = random_state(self.generators) if index == 0 or len(iterators) > 1 else None
        batch = super().__next__()
        if index == 0 or any(new is not old for new, old in zip(iterator.iterators, iterators, strict=True)):
            self._noted["drawn"].append({"batch": index, "state": before})
        return batch

    def begin(self, trainer: Trainer) -> None:
        """Makes the epoch's iterator again, from the states that are set."""
        for loader in self.flattened:
            _set_sampler_epoch(loader, _epoch(trainer))
        iter(fetcher_of(trainer))

    def read_on(self, trainer: Trainer, *, noted: Mapping[str, Any], num_batches: int, now: Mapping[str, Any]) -> None:
        """Makes the epoch's iterator again; its first batch is the one after `num_batches`, read from state `now`."""
        if _epoch(trainer) == 0:
            self.reset()  # persistent workers draw a seed when they start, in the first epoch only
        self._alone = trainer.world_size == 1
        self._set(noted["made"])
        self.begin(trainer)
        self._resume = noted, num_batches, now

    def _skip(self, noted: Mapping[str, Any], num_batches: int, now: Mapping[str, Any]) -> None:
        self._resume = None
        self._noted = {"made": noted["made"], "drawn": list(noted["drawn"])}
        states = {drawn["batch"]: drawn["state"] for drawn in noted["drawn"]}
        for index in range(num_batches):
            if index in states:
                self._set(states[index])
            super().__next__()
        self._set(now)

    def _set(self, state: Mapping[str, Any]) -> None:
        if self._alone:
            set_random_state(state, self.generators)


class _Source(_DataLoaderSource):
    """Where the training loaders come from, plain ones as `PlainLoaders`."""

    @override
    def dataloader(self) -> Any:
        given: Any = super().dataloader()
        if isinstance(given, CombinedLoader) and type(given) is not CombinedLoader:
            return given
        combined = given if isinstance(given, CombinedLoader) else CombinedLoader(given, "max_size_cycle")
        return PlainLoaders(combined.iterables, combined._mode) if all(map(_is_plain, combined.flattened)) else given


def note_epochs(trainer: Trainer) -> None:
    """From now on the trainer's plain training loaders are `PlainLoaders`."""
    loop = trainer.fit_loop
    if not isinstance(loop._data_source, _Source):
        loop._data_source = _Source(loop._data_source.instance, loop._data_source.name)


def plain_loaders(trainer: Trainer) -> PlainLoaders | None:
    """The training loaders, where they are set up, plain, and in an order that this process can draw again."""
    loaders = trainer.fit_loop._combined_loader
    if isinstance(loaders, PlainLoaders) and (trainer.world_size == 1 or loaders.distributed):
        return loaders
    return None


def training_source(trainer: Trainer) -> _DataLoaderSource:
    """Where the training loaders come from: a module, a data module, or what `fit` was given."""
    return trainer.fit_loop._data_source


def validation_loaders(trainer: Trainer) -> list[Any]:
    """The loaders of validation inside a fit, where they are set up."""
    combined = trainer.fit_loop.epoch_loop.val_loop._combined_loader
    return [] if combined is None else combined.flattened


def fetcher_of(trainer: Trainer) -> Any:
    """What reads the training loaders."""
    return trainer.fit_loop._data_fetcher


def batches_done(trainer: Trainer) -> int | None:
    """How many batches of a resumed epoch were trained on; None at the end of an epoch."""
    loop = trainer.fit_loop
    progress: Any = loop.epoch_loop.batch_progress
    done: int = progress.current.processed
    return done if loop.restarted_mid_epoch and not progress.is_last_batch and done < loop.max_batches else None


def _epoch(trainer: Trainer) -> int:
    """The number that samplers are told."""
    progress: Any = trainer.fit_loop.epoch_progress.current
    return progress.processed


def _is_plain(loader: Any) -> bool:
    return (
        isinstance(loader, DataLoader)
        and not isinstance(loader, _Stateful)
        and not isinstance(loader.dataset, IterableDataset)
    )
