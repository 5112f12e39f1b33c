"""Recovery: put the (cut) model in 4 bit and give it adapters, before optimizers exist."""

import logging
from typing import Literal

from lightning import Callback, LightningModule, Trainer
from peft import PeftModel
from transformers import PreTrainedModel
from typing_extensions import override

from callbacks._trainer import callbacks_of, is_first_setup, language_model
from callbacks.calibration import ExpertCalibration
from callbacks.channel_pruning import ChannelPruning
from lightning_moe.adapters.groups import describe_trainable, trainable_groups
from lightning_moe.adapters.inject import AdapterConfig, inject_adapters
from lightning_moe.quantization.linears import quantize_model
from lightning_moe.surgery.cut import convert_experts

log = logging.getLogger(__name__)


class Recovery(Callback):
    """Packs experts and Linear layers in NF4 and injects DoRA into experts and router (paper A's recovery recipe).

    Stands after `ChannelPruning` in the list; without one, the whole model is packed (the control of a recovery run).
    Prints and checks the trainable parameters of each group.

    Args:
        quantize: `nf4`, or `none` to train adapters on the 16-bit model.
        adapter: Ranks and layers of the adapters.
    """

    def __init__(self, *, quantize: Literal["nf4", "none"] = "nf4", adapter: AdapterConfig | None = None) -> None:
        if quantize not in ("nf4", "none"):
            raise ValueError(f"`quantize` must be 'nf4' or 'none', got '{quantize}'.")
        self.quantize = quantize
        self.adapter = adapter or AdapterConfig()
        self.peft_model: PeftModel | None = None
        self._model: PreTrainedModel | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Pack, inject, report; once."""
        self._check(trainer)
        model = language_model(pl_module)
        if not is_first_setup(self, model=model, done=self._model):
            return
        convert_experts(model)
        if self.quantize == "nf4":
            quantize_model(model)
        self.peft_model = inject_adapters(model, config=self.adapter)
        self._model = model
        log.info("Trainable parameters:\n%s", describe_trainable(trainable_groups(model)))

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The model must still be the one that was packed."""
        is_first_setup(self, model=language_model(pl_module), done=self._model)

    def _check(self, trainer: Trainer) -> None:
        """Refuses what would fail, or be silently wrong, later."""
        if trainer.precision in ("16-true", "bf16-true"):
            raise ValueError(
                f"Adapters train in fp32, and `precision: {trainer.precision}` would cast them. Use `32-true` or "
                "`bf16-mixed`; the `dtype` of the module decides the type of the frozen weights."
            )
        callbacks = callbacks_of(trainer)
        for callback in callbacks[callbacks.index(self) :]:
            if isinstance(callback, ExpertCalibration | ChannelPruning):
                raise ValueError(f"{type(callback).__name__} must stand before Recovery in `trainer.callbacks`.")
        if any(isinstance(callback, ChannelPruning) and callback.schedule is not None for callback in callbacks):
            raise ValueError("Recovery trains adapters, and `schedule` cuts weights in training. Use `prune_ratio`.")
