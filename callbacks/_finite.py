"""FiniteSteps: what the modules of `fit` do about NaN, for a LightningModule of somebody else's."""

from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch.optim import Optimizer
from typing_extensions import override

from lightning_moe.training.finite import FiniteModule, check_gradients, check_weights


class FiniteSteps(Callback):
    """Ends the training before a step whose gradients are NaN or infinite, and before such weights are saved.

    Pruning and Recovery put one into the trainer's list; a `FiniteModule` sees to it by itself.
    """

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Before clipping, and before a weight has seen the gradients."""
        if not isinstance(pl_module, FiniteModule):
            check_gradients(pl_module, optimizer=optimizer)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Before anything is written."""
        if not isinstance(pl_module, FiniteModule):
            check_weights(pl_module)
