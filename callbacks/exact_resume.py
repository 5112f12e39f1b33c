"""ExactResume: a resumed run goes on as if nothing had happened."""

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader
from typing_extensions import override

from callbacks._trainer import callbacks_of
from lightning_moe.training.random_state import random_state, set_random_state


class ExactResume(Callback):
    """Lets a resumed run draw the random numbers, and read the batches, that it would have without the interruption.

    Checkpoints hold the states of the generators (torch, CUDA, NumPy, Python), for dropout, for the order of a
    `DataLoader(shuffle=True)` after an epoch's end, and for whatever else draws from them. Several processes have a
    state each, and a checkpoint has room for one, which is not used. An epoch that `max_steps` or early stopping cut
    short is read on, where the loader can resume; Lightning alone counts it as done. Pruning and Recovery put an
    ExactResume first into the trainer's list.
    """

    def __init__(self) -> None:
        self._resumed: dict[str, Any] | None = None
        self._before_validation: dict[str, Any] | None = None

    @override
    def state_dict(self) -> dict[str, Any]:
        """The states when the checkpoint is written."""
        return random_state()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """On resume; what Lightning does until training goes on draws numbers too, so they are set later."""
        self._resumed = state_dict

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Before the loops get their state."""
        reopen_epoch(checkpoint)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After an epoch's last batch or end: the order of the next epoch is drawn when loaders are set up, now."""
        self._set(trainer)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After an epoch's last batch Lightning sets validation up and leaves it out: that must draw none of ours."""
        combined = trainer.fit_loop.epoch_loop.val_loop._combined_loader
        for loader in [] if combined is None else combined.flattened:
            if isinstance(loader, DataLoader) and loader.generator is None:
                loader.generator = torch.Generator()

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After an epoch's validation: its loaders are set up for nothing, and set up again after this."""
        loop = trainer.fit_loop
        if not loop.is_resuming and not loop.epoch_loop.restarting:
            self._set(trainer)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Within an epoch: the loader is set up and has drawn what it had drawn before the interruption."""
        if batch_idx:
            self._set(trainer)
        self._resumed = None

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Validation may follow, whose loaders draw numbers before its first hook."""
        self._before_validation = random_state()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run that is resumed from before a validation leaves it out: it must not move the numbers of training."""
        if self._before_validation is not None:
            set_random_state(self._before_validation)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """What a `validate` loaded is not for a later `fit`, nor the other way round."""
        self._resumed = self._before_validation = None

    def _set(self, trainer: Trainer) -> None:
        if self._resumed is not None and trainer.world_size == 1:
            set_random_state(self._resumed)


def resume_exactly(trainer: Trainer) -> None:
    """Puts an ExactResume first into the trainer's list, where there is none: callbacks that cut come after it."""
    callbacks = callbacks_of(trainer)
    if not any(isinstance(callback, ExactResume) for callback in callbacks):
        # A new list: Lightning is walking over the old one.
        trainer.callbacks = [ExactResume(), *callbacks]  # pyright: ignore[reportAttributeAccessIssue]


def reopen_epoch(checkpoint: dict[str, Any]) -> None:
    """Takes an epoch that ended before its last batch for a running one, if the loader has a state to resume from."""
    state: dict[str, Any] = checkpoint["loops"]["fit_loop"]
    epochs, batches = state["epoch_progress"], state["epoch_loop.batch_progress"]
    resumable = bool(state["state_dict"].get("combined_loader"))
    counted_as_done = epochs["current"]["processed"] == epochs["current"]["ready"] > 0
    if resumable and counted_as_done and batches["current"]["ready"] > 0 and not batches["is_last_batch"]:
        for progress in (epochs["current"], epochs["total"]):
            progress["processed"] -= 1
            progress["completed"] = min(progress["completed"], progress["processed"])
