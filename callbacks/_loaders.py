"""The loaders that the callbacks read beside training: calibration, first training batches, held-out text."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from lightning import Trainer
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks._epochs import training_source
from lightning_moe.calibration.processes import OwnShare, is_own_share
from lightning_moe.training.data import TextDataModule
from lightning_moe.training.random_state import own_generators

Batch = Mapping[str, Tensor]
Loaders = Mapping[str, Iterable[Batch]]


def calibration_loaders(trainer: Trainer, *, num_batches: int | None) -> Loaders:
    """One loader per calibration corpus; the first training batches, as corpus `train`, where there are none.

    Training batches are read here, once: they can be run again, and neither the random numbers nor the reading
    position of the training itself move. Of several processes each reads the same ones, to be shared out, or the first
    of its own share where the training loader gives it one already.

    Args:
        trainer: the running trainer.
        num_batches: batches of each corpus; all of them if None (required for training batches).

    Raises:
        ValueError: training batches are to be used and their number is not given, there are none, they can be read
            only once, or they are not dicts with `input_ids`.
    """
    datamodule = text_data(trainer)
    if datamodule is not None and datamodule.calibration_names:
        loaders = datamodule.calibration_dataloaders()
        return {name: _Head(loader, num_batches) for name, loader in loaders.items()}
    if num_batches is None:
        raise ValueError(
            "There are no calibration corpora (`data.calibration`), so the first training batches are used: "
            "say how many with `ExpertCalibration(num_batches=...)`."
        )
    with isolate_rng():
        return {"train": _first_batches(trainer, num_batches=num_batches)}


def _first_batches(trainer: Trainer, *, num_batches: int) -> list[Batch]:
    """Reads the training loader of `fit`, wherever it comes from."""
    source = training_source(trainer)
    if source.instance is None or not source.is_defined():
        raise ValueError(
            "There are no training batches to calibrate on. Give `data.calibration` corpora, or load statistics from a "
            "file with `ExpertCalibration(file=...)`."
        )
    given: Any = source.dataloader()
    combined = given if isinstance(given, CombinedLoader) else CombinedLoader(given, "max_size_cycle")
    for loader in combined.flattened:
        if isinstance(loader, Iterator):
            raise ValueError(
                f"Calibration would use up the first {num_batches} batches of a {type(loader).__name__}, which can be "
                "read only once. Give a DataLoader."
            )
    shared_out = any(is_own_share(loader) for loader in combined.flattened)
    num_own = -(-num_batches // trainer.world_size) if shared_out else num_batches
    batches = _read_first(combined, num_batches=num_own)
    for batch in batches:
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            raise ValueError(f"Calibration needs batches that are dicts with `input_ids`, got {type(batch).__name__}.")
    return _OwnBatches(batches) if shared_out else batches


def _read_first(combined: CombinedLoader, *, num_batches: int) -> list[Any]:
    """Leaves the loaders' own generators as they are."""
    loaders = [loader for loader in combined.flattened if isinstance(loader, DataLoader)]
    generators = [generator for loader in loaders for generator in own_generators(loader)]
    states = [generator.get_state() for generator in generators]
    batches = [batch for batch, _, _ in islice(combined, num_batches)]
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)
    return batches


def validation_loaders(trainer: Trainer) -> Loaders:
    """One loader per validation corpus of the text data module.

    Raises:
        ValueError: the trainer has no TextDataModule, or it has no validation corpora.
    """
    datamodule = text_data(trainer)
    if datamodule is None or not datamodule.validation_names:
        raise ValueError("CompressionReport evaluates on held-out text: give a TextDataModule with `validation`.")
    return datamodule.validation_dataloaders()


def given_validation_loaders(trainer: Trainer) -> Any:
    """The validation loaders of a fit, set up now where Lightning would do so only in a later epoch; None: no such."""
    if trainer.val_dataloaders is None and trainer.enable_validation:
        trainer.fit_loop.epoch_loop.val_loop.setup_data()
    return trainer.val_dataloaders


def text_data(trainer: Trainer) -> TextDataModule | None:
    """The trainer's data module if it is ours."""
    datamodule: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
    return datamodule if isinstance(datamodule, TextDataModule) else None


class _OwnBatches(list[Batch], OwnShare):
    """Batches of this process alone."""


class _Head(Iterable[Batch]):
    """The first batches of a loader; can be iterated again."""

    def __init__(self, loader: Iterable[Batch], num_batches: int | None) -> None:
        self.loader = loader
        self.num_batches = num_batches

    def __iter__(self) -> Iterator[Batch]:
        return islice(iter(self.loader), self.num_batches)
