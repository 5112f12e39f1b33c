"""Everything the callbacks need of Trainer internals, in one file."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, TypeVar

from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from transformers import PreTrainedModel

from lightning_moe.models.discovery import find_language_model
from lightning_moe.training.data import TextDataModule

CallbackT = TypeVar("CallbackT", bound=Callback)
Loaders = Mapping[str, Iterable[Mapping[str, Tensor]]]


def language_model(pl_module: LightningModule) -> PreTrainedModel:
    """The transformers model inside any LightningModule; built through `configure_model` if it is not there yet.

    Raises:
        ValueError: there is none, or more than one.
    """
    if not any(isinstance(module, PreTrainedModel) for module in pl_module.modules()):
        pl_module.configure_model()
    return find_language_model(pl_module)


def find_callback(trainer: Trainer, kind: type[CallbackT], *, before: Callback) -> CallbackT:
    """The callback of this class in the trainer's list, which must stand before the one that asks.

    Raises:
        ValueError: it is missing, or stands later in the list.
    """
    callbacks: list[Callback] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    for position, callback in enumerate(callbacks):
        if isinstance(callback, kind):
            if position > callbacks.index(before):
                raise ValueError(f"{kind.__name__} must stand before {type(before).__name__} in `trainer.callbacks`.")
            return callback
    raise ValueError(f"{type(before).__name__} needs a {kind.__name__} before it in `trainer.callbacks`.")


def calibration_loaders(trainer: Trainer, pl_module: LightningModule, *, num_batches: int | None) -> Loaders:
    """One loader per calibration corpus; the first training batches, as corpus `train`, where there are none.

    Args:
        trainer: the running trainer.
        pl_module: its module.
        num_batches: batches of each corpus; all of them if None (required for training batches).

    Raises:
        ValueError: training batches are to be used and their number is not given, or they are not dicts with
            `input_ids`.
    """
    datamodule = text_data(trainer)
    if datamodule is not None and datamodule.calibration_names:
        loaders: Loaders = datamodule.calibration_dataloaders()
        return {name: _Head(loader, num_batches) for name, loader in loaders.items()}
    if num_batches is None:
        raise ValueError(
            "There are no calibration corpora (`data.calibration`), so the first training batches are used: "
            "say how many with `ExpertCalibration(num_batches=...)`."
        )
    source = trainer.datamodule if trainer.datamodule is not None else pl_module  # pyright: ignore
    loader = trainer.fit_loop._data_source.instance or source  # the loader or the object that makes it
    train_loader = loader.train_dataloader() if isinstance(loader, LightningModule | type(source)) else loader
    return {"train": _Head(train_loader, num_batches)}


def validation_loaders(trainer: Trainer) -> Loaders:
    """One loader per validation corpus of the text data module.

    Raises:
        ValueError: the trainer has no TextDataModule.
    """
    datamodule = text_data(trainer)
    if datamodule is None:
        raise ValueError("This callback evaluates named corpora and needs a TextDataModule.")
    return dict(zip(datamodule.validation_names, datamodule.val_dataloader(), strict=True))


def find_optional(trainer: Trainer, kind: type[CallbackT]) -> CallbackT | None:
    """The first callback of this class in the trainer's list, if there is one."""
    callbacks: list[Callback] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    return next((callback for callback in callbacks if isinstance(callback, kind)), None)


def text_data(trainer: Trainer) -> TextDataModule | None:
    """The trainer's data module if it is ours."""
    datamodule: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
    return datamodule if isinstance(datamodule, TextDataModule) else None


class _Head(Iterable[Mapping[str, Tensor]]):
    """The first batches of a loader; can be iterated again."""

    def __init__(self, loader: Iterable[Mapping[str, Tensor]], num_batches: int | None) -> None:
        self.loader = loader
        self.num_batches = num_batches

    def __iter__(self) -> Iterator[Mapping[str, Tensor]]:
        for batch in islice(self.loader, self.num_batches):
            if not isinstance(batch, Mapping) or "input_ids" not in batch:
                raise ValueError(
                    f"Calibration needs batches that are dicts with `input_ids`, got {type(batch).__name__}."
                )
            yield batch
