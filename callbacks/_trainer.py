"""Everything the callbacks need of Trainer internals, in one file."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from fsspec.core import url_to_fs
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.utilities.cloud_io import _load as pl_load
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from transformers import PreTrainedModel

from lightning_moe.models.discovery import find_language_model
from lightning_moe.training.checkpoint_files import check_content, checkpoint_errors, read_checkpoint
from lightning_moe.training.module import LanguageModelModule

CallbackT = TypeVar("CallbackT", bound=Callback)


def language_model(pl_module: LightningModule, *, in_shares: bool = False) -> PreTrainedModel:
    """The transformers model inside any LightningModule; built by the module if it is not there yet.

    Args:
        pl_module: the module.
        in_shares: expert rows may be on the meta device until the model is sharded (`load_language_model` of ours).

    Raises:
        ValueError: there is none, or more than one.
    """
    if isinstance(pl_module, LanguageModelModule):
        pl_module.load_language_model(in_shares=in_shares)  # not sharded, which `configure_model` may do
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


def state_key_of(callback: Callback, **settings: Any) -> str:
    """The key of a callback's state in a checkpoint; `settings` tell it apart from others of its class."""
    return callback._generate_state_key(**settings)


def resumed_checkpoint(trainer: Trainer) -> Mapping[str, Any] | None:
    """The checkpoint that this run goes on from, already in `setup`; tensors are not read, or left out (of folders).

    Raises:
        ValueError: there is no such file, it cannot be read, or it is no checkpoint that this run can go on from.
    """
    path, weights_only = _resume_arguments(trainer)
    if path is None:
        return None
    checkpoint = _read(path, weights_only=weights_only)
    if trainer.state.fn == TrainerFn.FITTING and "callbacks" not in checkpoint:
        raise ValueError(
            "The checkpoint holds weights only, and training cannot go on from it. Resume from one that was saved "
            "with `save_weights_only=False`, or start a new run from these weights."
        )
    return checkpoint


def _read(path: str | Path, *, weights_only: bool | None) -> Mapping[str, Any]:
    file = Path(path) / "meta.pt" if Path(path).is_dir() else path
    if url_to_fs(str(file))[0].protocol[0] == "file":
        return read_checkpoint(file, trusted=weights_only is False)
    if weights_only is None and str(path).startswith("http"):  # of other places it reads data alone
        raise ValueError(
            f"The checkpoint '{path}' is read over http, and Lightning would run code that is in it. Copy it "
            "here, or give `weights_only=True` (or false, if you trust it) beside `ckpt_path`."
        )
    with checkpoint_errors(path):
        content = pl_load(file, map_location="cpu", weights_only=weights_only)
    check_content(content, path=path)
    return content


def _resume_arguments(trainer: Trainer) -> tuple[Any, bool | None]:
    """`ckpt_path` (resolved) and `weights_only`: arguments of `Trainer._run`, which it keeps until after `setup`."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is Trainer._run.__code__ and frame.f_locals["self"] is trainer:
            return frame.f_locals["ckpt_path"], frame.f_locals["weights_only"]
        frame = frame.f_back
    return trainer.ckpt_path, None
