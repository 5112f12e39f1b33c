"""Everything the callbacks need of Trainer internals, in one file."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import torch
from fsspec.core import url_to_fs
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.utilities.cloud_io import _load as pl_load
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from transformers import PreTrainedModel

from lightning_moe.calibration.processes import OwnShare, is_own_share
from lightning_moe.models.discovery import find_language_model
from lightning_moe.training.data import TextDataModule
from lightning_moe.training.module import LanguageModelModule

CallbackT = TypeVar("CallbackT", bound=Callback)
Batch = Mapping[str, Tensor]
Loaders = Mapping[str, Iterable[Batch]]


def language_model(pl_module: LightningModule) -> PreTrainedModel:
    """The transformers model inside any LightningModule; built by the module if it is not there yet.

    Raises:
        ValueError: there is none, or more than one.
    """
    if isinstance(pl_module, LanguageModelModule):
        pl_module.load_language_model()  # whole: `configure_model` may shard it
    elif not any(isinstance(module, PreTrainedModel) for module in pl_module.modules()):
        pl_module.configure_model()
    return find_language_model(pl_module)


def is_first_setup(callback: Callback, *, model: PreTrainedModel, done: PreTrainedModel | None) -> bool:
    """Whether `callback` has its work on `model` still before it; `done` is the model it did it on.

    Raises:
        ValueError: it was used on another model.
    """
    if done is None:
        return True
    if done is not model:
        raise ValueError(
            f"This {type(callback).__name__} was used on another model. Make a new one for each model, and let "
            "`configure_model` build the model only once."
        )
    return False


def move_to_device(trainer: Trainer, pl_module: LightningModule) -> None:
    """Moves the module where it will be trained: Lightning does so only after `setup`, and calibration runs in it.

    Strategies that shard the model are left alone.
    """
    if isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
        pl_module.to(trainer.strategy.root_device)


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """The trainer's callbacks, in their order."""
    return trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]


def find_callback(trainer: Trainer, kind: type[CallbackT], *, before: Callback) -> CallbackT:
    """The callback of this class in the trainer's list, which must stand before the one that asks.

    Raises:
        ValueError: it is missing, or stands later in the list.
    """
    callbacks = callbacks_of(trainer)
    for position, callback in enumerate(callbacks):
        if isinstance(callback, kind):
            if position > callbacks.index(before):
                raise ValueError(f"{kind.__name__} must stand before {type(before).__name__} in `trainer.callbacks`.")
            return callback
    raise ValueError(f"{type(before).__name__} needs a {kind.__name__} before it in `trainer.callbacks`.")


def find_optional(trainer: Trainer, kind: type[CallbackT]) -> CallbackT | None:
    """The first callback of this class in the trainer's list, if there is one."""
    return next((callback for callback in callbacks_of(trainer) if isinstance(callback, kind)), None)


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
    source = trainer.fit_loop._data_source
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
    batches = [batch for batch, _, _ in islice(combined, num_own)]
    for batch in batches:
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            raise ValueError(f"Calibration needs batches that are dicts with `input_ids`, got {type(batch).__name__}.")
    return _OwnBatches(batches) if shared_out else batches


def validation_loaders(trainer: Trainer) -> Loaders:
    """One loader per validation corpus of the text data module.

    Raises:
        ValueError: the trainer has no TextDataModule, or it has no validation corpora.
    """
    datamodule = text_data(trainer)
    if datamodule is None or not datamodule.validation_names:
        raise ValueError("CompressionReport evaluates on held-out text: give a TextDataModule with `validation`.")
    return datamodule.validation_dataloaders()


def text_data(trainer: Trainer) -> TextDataModule | None:
    """The trainer's data module if it is ours."""
    datamodule: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
    return datamodule if isinstance(datamodule, TextDataModule) else None


def resumed_checkpoint(trainer: Trainer) -> Mapping[str, Any] | None:
    """The checkpoint that this run goes on from, already in `setup`; tensors are not read, or left out (of folders).

    Raises:
        ValueError: there is no such file, or it cannot be read.
    """
    path, weights_only = _resume_arguments(trainer)
    if path is None:
        return None
    file = Path(path) / "meta.pt" if Path(path).is_dir() else path
    try:
        if url_to_fs(str(file))[0].protocol[0] != "file":
            return pl_load(file, map_location="cpu", weights_only=weights_only)
        return torch.load(file, map_location="cpu", weights_only=weights_only, mmap=True)
    except (OSError, RuntimeError, EOFError, UnpicklingError, LookupError, ValueError) as error:
        raise ValueError(
            f"The checkpoint '{path}' cannot be read: {error}. Was the run killed while it was written, or copied in "
            "part? Resume from an older one."
        ) from error


def _resume_arguments(trainer: Trainer) -> tuple[Any, bool | None]:
    """`ckpt_path` (resolved) and `weights_only`: arguments of `Trainer._run`, which it keeps until after `setup`."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is Trainer._run.__code__ and frame.f_locals["self"] is trainer:
            return frame.f_locals["ckpt_path"], frame.f_locals["weights_only"]
        frame = frame.f_back
    return trainer.ckpt_path, None


class _OwnBatches(list[Batch], OwnShare):
    """Batches of this process alone."""


class _Head(Iterable[Batch]):
    """The first batches of a loader; can be iterated again."""

    def __init__(self, loader: Iterable[Batch], num_batches: int | None) -> None:
        self.loader = loader
        self.num_batches = num_batches

    def __iter__(self) -> Iterator[Batch]:
        return islice(iter(self.loader), self.num_batches)
