"""ExactResume: a resumed run goes on as if nothing had happened."""

import warnings
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader
from typing_extensions import override

from callbacks._epochs import batches_done, note_epochs, plain_loaders, validation_loaders
from callbacks._finite import FiniteSteps
from callbacks._trainer import callbacks_of, resumed_checkpoint
from lightning_moe.training.checkpoint_writing import write_whole_checkpoints
from lightning_moe.training.random_state import random_state, set_random_state


class ExactResume(Callback):
    """Lets a resumed run draw the random numbers, and read the batches, that it would have without the interruption.

    Checkpoints hold the states of the generators (torch, CUDA, NumPy, Python, the training loader's own), for dropout,
    for the order of a `DataLoader(shuffle=True)`, and for whatever else draws from them. Several processes have a state
    each, and a checkpoint has room for one, which is not used. Within an epoch, a plain DataLoader reads its batches
    again up to the next one; loaders with a `state_dict` resume by themselves, and others, such as those of an
    IterableDataset, begin anew. Of several processes only loaders with a DistributedSampler read on. An epoch that
    `max_steps` or early stopping cut short is read on too; Lightning alone counts it as done. Pruning and Recovery put
    an ExactResume first into the trainer's list.
    """

    def __init__(self) -> None:
        self._trainer: Trainer | None = None
        self._resumed: dict[str, Any] | None = None
        self._before_validation: dict[str, Any] | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before the loaders are made.

        Raises:
            ValueError: there is no checkpoint that training can go on from.
        """
        resumed_checkpoint(trainer)
        self.attach(trainer)

    def attach(self, trainer: Trainer) -> None:
        """Notes the epochs of this trainer's loaders, and lets no checkpoint be half there."""
        self._trainer = trainer
        write_whole_checkpoints(trainer)
        note_epochs(trainer)

    @override
    def state_dict(self) -> dict[str, Any]:
        """The states when the checkpoint is written, and those that the loaders' epoch began with."""
        loaders = None if self._trainer is None else plain_loaders(self._trainer)
        if loaders is None:
            return random_state() | {"epoch": None}
        return random_state(loaders.generators) | {"epoch": loaders.noted()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """On resume; what Lightning does until training goes on draws numbers too, so they are set later."""
        self._resumed = {"generators": [], "epoch": None} | state_dict  # older checkpoints lack these

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Before the loops get their state."""
        own = checkpoint["callbacks"].get(self.state_key, {})
        reopen_epoch(checkpoint, resumable=bool(own.get("epoch")))

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After an epoch's last batch or end: the order of the next epoch is drawn when loaders are set up, now."""
        self._set(trainer)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Plain loaders go on where they were.

        After an epoch's last batch Lightning sets validation up and leaves it out: that must draw none of ours.
        """
        self._read_on(trainer)
        for loader in validation_loaders(trainer):
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

    def _read_on(self, trainer: Trainer) -> None:
        loaders = plain_loaders(trainer)
        if self._resumed is None or loaders is None:
            return
        warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch")
        noted, num_batches = self._resumed["epoch"], batches_done(trainer)
        if noted is not None and num_batches is not None:
            loaders.read_on(trainer, noted=noted, num_batches=num_batches, now=self._resumed)
            self._resumed = None
        else:
            self._set(trainer)
            loaders.begin(trainer)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """What a `validate` loaded is not for a later `fit`, nor the other way round."""
        self._trainer = self._resumed = self._before_validation = None

    def _set(self, trainer: Trainer) -> None:
        if self._resumed is not None and trainer.world_size == 1:
            loaders = plain_loaders(trainer)
            set_random_state(self._resumed, [] if loaders is None else loaders.generators)


def resume_exactly(trainer: Trainer) -> None:
    """Puts an ExactResume first into the trainer's list, where there is none: callbacks that cut come after it.

    Beside it goes a FiniteSteps, so that there is a step before a NaN to go on from.
    """
    callbacks = callbacks_of(trainer)
    if not any(isinstance(callback, ExactResume) for callback in callbacks):
        exact = ExactResume()
        exact.attach(trainer)
        # A new list: Lightning is walking over the old one.
        trainer.callbacks = [exact, FiniteSteps(), *callbacks]  # pyright: ignore[reportAttributeAccessIssue]


def reopen_epoch(checkpoint: dict[str, Any], *, resumable: bool) -> None:
    """Takes an epoch that ended before its last batch for a running one, if the loader can go on within it.

    Args:
        checkpoint: its progress is changed.
        resumable: whether plain loaders can; those with a state have it in the checkpoint.
    """
    state: dict[str, Any] = checkpoint["loops"]["fit_loop"]
    epochs, batches = state["epoch_progress"], state["epoch_loop.batch_progress"]
    resumable = resumable or bool(state["state_dict"].get("combined_loader"))
    counted_as_done = epochs["current"]["processed"] == epochs["current"]["ready"] > 0
    if resumable and counted_as_done and batches["current"]["ready"] > 0 and not batches["is_last_batch"]:
        for progress in (epochs["current"], epochs["total"]):
            progress["processed"] -= 1
            progress["completed"] = min(progress["completed"], progress["processed"])
