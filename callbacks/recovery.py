"""Recovery: put the (cut) model in 4 bit and give it adapters, before optimizers exist."""

import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal

from lightning import Callback, LightningModule, Trainer
from peft import PeftModel
from transformers import PreTrainedModel
from typing_extensions import override

from callbacks._averaging import check_averaging
from callbacks._pruning import waits_for_fit
from callbacks._statistics import StatisticsUser
from callbacks._strategy import check_strategy, check_whole
from callbacks._trainer import callbacks_of, is_first_setup, language_model, resumed_checkpoint
from callbacks.calibration import ExpertCalibration
from callbacks.exact_resume import resume_exactly
from lightning_moe.adapters.groups import describe_trainable, trainable_groups
from lightning_moe.adapters.inject import AdapterConfig, inject_adapters
from lightning_moe.adapters.storage import adapter_settings
from lightning_moe.quantization.linears import quantize_model
from lightning_moe.surgery.cut import convert_experts
from lightning_moe.training.checkpoint import restore_structure, write_structure
from lightning_moe.training.rank_loading import drawn_later

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
        """Pack, inject, report; once. On resume what the checkpoint has: cuts of a schedule may have lowered limits."""
        self._check(trainer)
        resume_exactly(trainer)
        model = language_model(pl_module, in_shares=True)  # nothing after this needs the rows before they are sharded
        if not is_first_setup(self, model=model, done=self._model) or waits_for_fit(trainer):
            return
        check_whole(model)
        if adapter_settings(model) is not None:
            raise ValueError(
                "The model has an adapter already, perhaps from `load_from_checkpoint`. Train it without Recovery, or "
                "give a module that was just made, with the checkpoint as `ckpt_path`."
            )
        checkpoint = resumed_checkpoint(trainer)
        with drawn_later(model):
            self.peft_model = self._begin(model) if checkpoint is None else self._resume(model, checkpoint)
        self._model = model
        log.info("Trainable parameters:\n%s", describe_trainable(trainable_groups(model)))

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The model must still be the one that was packed."""
        is_first_setup(self, model=language_model(pl_module), done=self._model)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Notes the structure, for modules that are not ours."""
        write_structure(checkpoint, model=language_model(pl_module))

    @override
    def state_dict(self) -> dict[str, Any]:
        """What was asked for, so that a resumed run can be refused that asks for something else."""
        layers = None if self.adapter.layers is None else list(self.adapter.layers)
        return {"quantize": self.quantize} | asdict(self.adapter) | {"layers": layers}

    def _begin(self, model: PreTrainedModel) -> PeftModel:
        convert_experts(model)
        if self.quantize == "nf4":
            quantize_model(model)
        return inject_adapters(model, config=self.adapter)

    def _resume(self, model: PreTrainedModel, checkpoint: Mapping[str, Any]) -> PeftModel:
        asked = self.state_dict()
        noted: dict[str, Any] = checkpoint.get("callbacks", {}).get(self.state_key, asked)
        other = {name: asked.get(name) for name in sorted(noted | asked) if noted.get(name) != asked.get(name)}
        if other:
            raise ValueError(
                f"Recovery has {other}, and the checkpoint was trained with {[noted.get(name) for name in other]}. "
                "Resume with the same settings, or start a new run from an exported model (`source`)."
            )
        peft_model = restore_structure(checkpoint, model=model)
        if peft_model is None:
            raise ValueError(
                "The checkpoint was written by a run without Recovery. Leave Recovery out, or start a new run from an "
                "exported model (`source`)."
            )
        return peft_model

    def _check(self, trainer: Trainer) -> None:
        """Refuses what would fail, or be silently wrong, later."""
        check_averaging(trainer, self, packed=self.quantize == "nf4")
        check_strategy(trainer, scheduled=False)
        if trainer.precision in ("16-true", "bf16-true"):
            raise ValueError(
                f"Adapters train in fp32, and `precision: {trainer.precision}` would cast them. Use `32-true` or "
                "`bf16-mixed`; the `dtype` of the module decides the type of the frozen weights."
            )
        callbacks = callbacks_of(trainer)
        for callback in callbacks[callbacks.index(self) :]:
            if isinstance(callback, ExpertCalibration | StatisticsUser):
                raise ValueError(f"{type(callback).__name__} must stand before Recovery in `trainer.callbacks`.")
