"""A training step whose loss or gradients are NaN or infinite ends the training before a weight has seen them.

L losses or norms of gradients.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from transformers import PreTrainedModel
from typing_extensions import override

from lightning_moe.calibration.collector import CalibrationCollector
from lightning_moe.calibration.nonfinite import NonFiniteError
from lightning_moe.training.model_source import processes_of
from lightning_moe.training.sharding import is_sharded

_ADVICE = (
    "The weights and all checkpoints are as the step before left them. Lower the learning rate, or clip gradients "
    "(`trainer.gradient_clip_val`), and begin again or go on from the last checkpoint (`ckpt_path`)."
)


class FiniteModule(LightningModule):
    """Stops at the first optimizer step with NaN or infinity in its loss or gradients.

    One look at the gradients and one wait for the device an optimizer step. Under `16-mixed` infinite gradients are
    the scaler's business, which leaves such steps out; a loss that is not finite ends the training there too.
    """

    def __init__(self) -> None:
        super().__init__()
        # Of the micro-batches since the last optimizer step.
        self._step_batches: list[Mapping[str, Tensor]] = []
        self._step_losses: list[Tensor] = []

    @property
    @abstractmethod
    def language_model(self) -> PreTrainedModel:
        """The model that is trained."""

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Remembers the batch, to say where in the model a loss went wrong."""
        self._step_batches.append({name: batch[name] for name in ("input_ids", "attention_mask") if name in batch})

    @override
    def on_before_backward(self, loss: Tensor) -> None:
        """Remembers the loss; nobody waits for it here."""
        self._step_losses.append(loss.detach())

    @override
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Looks at the losses and gradients of this step, of all processes.

        Raises:
            ValueError: one is not finite; the message names the step, and the layer and expert where it begins.
        """
        batches, self._step_batches = self._step_batches, []
        losses, self._step_losses = self._step_losses, []
        if not losses:
            return
        finite_L = torch.stack([loss.isfinite() for loss in losses])
        scaled = self.trainer.precision == "16-mixed"
        gradients = torch.ones_like(finite_L[0]) if scaled else _norm(optimizer).isfinite().to(finite_L.device)
        broken_2 = torch.stack([~finite_L.all(), ~gradients]).float()
        processes_of(self).max_(broken_2)
        loss_broken, gradients_broken = broken_2.tolist()
        if not loss_broken and not gradients_broken:
            return
        step, what = self.trainer.global_step + 1, "loss" if loss_broken else "gradients"
        where = self._where(batches, finite_L) if loss_broken else _first_gradient(self)
        raise ValueError(f"Step {step}: NaN or infinity in the {what}{self._shown(loss_broken)}{where}. {_ADVICE}")

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Before anything is written: the last step may have driven a weight to infinity.

        Of shards each process looks at its own, and waits for nobody.

        Raises:
            ValueError: a trained weight is not finite; older checkpoints stay.
        """
        check_weights(self)

    def _shown(self, loss_broken: float) -> str:
        """The parts of the loss, as they were logged last."""
        if not loss_broken:
            return ""
        metrics = self.trainer.callback_metrics
        parts = [f"{name} {float(value):.4g}" for name, value in metrics.items() if name.endswith("_loss")]
        return f" ({', '.join(parts)})" if parts else ""

    def _where(self, batches: Sequence[Mapping[str, Tensor]], finite_L: Tensor) -> str:
        """Runs the first bad batch once more, layer by layer; nothing where that cannot be done."""
        model = self.language_model
        if bool(finite_L.all()) or is_sharded(model):  # it is another process's, or in shards
            return ""
        batch = batches[int((~finite_L).long().argmax()) % len(batches)]
        damaged = _first_broken(dict(self.named_parameters()))
        if damaged is not None:
            return f", because the weights '{damaged}' are not finite"
        precision = self.trainer.precision_plugin
        try:
            with (
                precision.forward_context(),
                CalibrationCollector(model, moments=False) as collector,
                collector.batch(corpus="train", attention_mask=batch.get("attention_mask")),
            ):
                model.get_decoder()(**batch, use_cache=False)
        except NonFiniteError as error:
            return f", first in {error.place} of '{error.layer}'"
        except (ValueError, torch.OutOfMemoryError):  # a model without experts, or no room for another pass
            return ""
        return "; all decoder layers are finite on this batch"


def check_gradients(module: LightningModule, *, optimizer: Optimizer) -> None:
    """The same for a module that is not ours, of which nobody has seen the loss: looks at the gradients of this step.

    Under `16-mixed` it does nothing.

    Args:
        module: what is trained.
        optimizer: whose step comes next.

    Raises:
        ValueError: a gradient is not finite, in any process.
    """
    if module.trainer.precision == "16-mixed":
        return
    broken = (~_norm(optimizer).isfinite()).float().to(module.device)
    processes_of(module).max_(broken)
    if broken.item():
        step = module.trainer.global_step + 1
        raise ValueError(f"Step {step}: NaN or infinity in the gradients{_first_gradient(module)}. {_ADVICE}")


def check_weights(module: LightningModule) -> None:
    """Before a checkpoint is written.

    Raises:
        ValueError: a trained weight is not finite.
    """
    name = _first_broken({name: value for name, value in module.named_parameters() if value.requires_grad})
    if name is not None:
        raise ValueError(
            f"After step {module.trainer.global_step}: the weights '{name}' are not finite. This checkpoint is not "
            "written, and older ones stay. Lower the learning rate, or clip gradients (`trainer.gradient_clip_val`)."
        )


def _norm(optimizer: Optimizer) -> Tensor:
    """Of all gradients of this process together: one NaN or infinity makes it one."""
    gradients = [value.grad for group in optimizer.param_groups for value in group["params"] if value.grad is not None]
    return get_total_norm([_own(value) for value in gradients])


def _first_broken(tensors: Mapping[str, Tensor]) -> str | None:
    return next((name for name, value in tensors.items() if not _own(value).isfinite().all()), None)


def _own(value: Tensor) -> Tensor:
    """This process's part."""
    return value.to_local() if isinstance(value, DTensor) else value


def _first_gradient(module: LightningModule) -> str:
    gradients = {name: value.grad for name, value in module.named_parameters() if value.grad is not None}
    broken = [name for name, value in gradients.items() if not _own(value).isfinite().all()]
    return f" of {len(broken)} of {len(gradients)} tensors, first of '{broken[0]}'" if broken else ""
