"""Recovery: put the (cut) model in 4 bit and give it adapters, before optimizers exist."""

import logging
from typing import Literal

from lightning import Callback, LightningModule, Trainer
from peft import PeftModel
from typing_extensions import override

from callbacks._trainer import language_model
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

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Pack, inject, report; once."""
        if self.peft_model is not None:
            return
        model = language_model(pl_module)
        convert_experts(model)
        if self.quantize == "nf4":
            quantize_model(model)
        self.peft_model = inject_adapters(model, config=self.adapter)
        log.info("Trainable parameters:\n%s", describe_trainable(trainable_groups(model)))
