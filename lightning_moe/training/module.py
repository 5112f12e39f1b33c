"""LightningModules: a language model trained whole, and one recovered through its adapters."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torchmetrics.text import Perplexity
from transformers import PreTrainedModel
from typing_extensions import override

from lightning_moe.adapters.groups import trainable_groups
from lightning_moe.evaluation.perplexity import update_perplexity
from lightning_moe.models.loading import DtypeName, load_model
from lightning_moe.training.data import TextDataModule
from lightning_moe.training.losses import distillation_loss
from lightning_moe.training.optim import (
    OptimizerName,
    ScheduleName,
    build_optimizer,
    build_schedule,
    check_optimizer,
    check_schedule,
)


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """Constructor arguments that both modules share."""

    source: str
    from_scratch: bool
    dtype: DtypeName
    optimizer: OptimizerName
    weight_decay: float
    betas: tuple[float, float]
    schedule: ScheduleName
    warmup_ratio: float
    router_loss: float
    gradient_checkpointing: bool


class LanguageModelModule(LightningModule):
    """A causal language model with next-token loss, per-corpus perplexity, AdamW and a warmup schedule.

    Args:
        source: Folder, `asset:small_moe` or hub name of the model.
        from_scratch: Start from random weights in the shape of the source's config.
        dtype: Type of the weights; `auto` keeps the stored one.
        learning_rate: Peak learning rate.
        optimizer: `adamw`, `adamw8bit` or `paged_adamw8bit` (the last needs a GPU).
        weight_decay: Decoupled weight decay.
        betas: Adam's decay rates.
        schedule: `linear` or `cosine` decay after the warmup, or `constant_with_warmup`.
        warmup_ratio: Share of the optimizer steps spent warming up.
        router_loss: Coefficient of transformers' load-balancing loss; 0 leaves it out.
        gradient_checkpointing: Recompute each decoder layer in backward.
    """

    def __init__(
        self,
        *,
        source: str,
        from_scratch: bool = False,
        dtype: DtypeName = "auto",
        learning_rate: float = 1e-4,
        optimizer: OptimizerName = "adamw",
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        schedule: ScheduleName = "linear",
        warmup_ratio: float = 0.1,
        router_loss: float = 0.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.settings = _Settings(
            source=source,
            from_scratch=from_scratch,
            dtype=dtype,
            optimizer=optimizer,
            weight_decay=weight_decay,
            betas=betas,
            schedule=schedule,
            warmup_ratio=warmup_ratio,
            router_loss=router_loss,
            gradient_checkpointing=gradient_checkpointing,
        )
        check_optimizer(optimizer)
        check_schedule(schedule, warmup_ratio=warmup_ratio)
        self.learning_rate = learning_rate
        self.model: PreTrainedModel | None = None
        self.perplexity = nn.ModuleList()

    @property
    def language_model(self) -> PreTrainedModel:
        """The loaded model; `configure_model` must have run."""
        if self.model is None:
            raise ValueError("The model is not loaded yet: call `configure_model()` first.")
        return self.model

    @override
    def configure_model(self) -> None:
        """Loads the model once; later calls change nothing."""
        if self.model is not None:
            return
        settings = self.settings
        self.model = load_model(settings.source, dtype=settings.dtype, from_scratch=settings.from_scratch)
        if settings.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        if settings.router_loss:
            _set_router_loss(self.model, settings.router_loss)

    @override
    def on_fit_start(self) -> None:
        """Pretrained models come in eval mode and Lightning keeps that; training wants `train()`."""
        self.language_model.train()

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Mean next-token loss of the batch, in nats."""
        outputs = self.language_model(**batch, use_cache=False, output_router_logits=self.settings.router_loss > 0)
        self.log("train_loss", outputs.loss, prog_bar=True)
        return outputs.loss

    @override
    def on_validation_start(self) -> None:
        """One perplexity per validation corpus."""
        metrics = [Perplexity(ignore_index=-100) for _ in self._validation_names()]
        self.perplexity = nn.ModuleList(metrics).to(self.device)

    @override
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds the batch's next-token probabilities to its corpus's perplexity."""
        logits = self.language_model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).logits
        update_perplexity(cast(Perplexity, self.perplexity[dataloader_idx]), logits, batch["labels"])

    @override
    def on_validation_epoch_end(self) -> None:
        """Logs `perplexity/<corpus>`, `nll/<corpus>` (nats per token) and their mean over corpora as `nll`."""
        metrics = cast(Iterable[Perplexity], self.perplexity)
        perplexity = {name: metric.compute() for name, metric in zip(self._validation_names(), metrics, strict=True)}
        for name, value in perplexity.items():
            self.log(f"perplexity/{name}", value, sync_dist=False)
            self.log(f"nll/{name}", value.log(), sync_dist=False)
        self.log("nll", torch.stack(list(perplexity.values())).log().mean(), prog_bar=True, sync_dist=False)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """All trainable parameters in one group."""
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return [{"name": "model", "params": parameters, "lr": self.learning_rate}]

    @override
    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW over `parameter_groups` and the warmup schedule, stepped every optimizer step."""
        settings = self.settings
        optimizer = build_optimizer(
            self.parameter_groups(), name=settings.optimizer, weight_decay=settings.weight_decay, betas=settings.betas
        )
        schedule = build_schedule(
            optimizer,
            name=settings.schedule,
            warmup_ratio=settings.warmup_ratio,
            num_steps=self.trainer.estimated_stepping_batches,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _validation_names(self) -> tuple[str, ...]:
        """Names of the validation corpora, where the data module has them; numbers otherwise."""
        datamodule: Any = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(datamodule, TextDataModule):
            return datamodule.validation_names
        loaders = self.trainer.val_dataloaders
        return tuple(str(index) for index in range(len(loaders) if isinstance(loaders, list | tuple) else 1))


class RecoveryModule(LanguageModelModule):
    """A cut, packed model whose adapters are trained: experts and router each at their own learning rate.

    The adapters come from the `Recovery` callback. Checkpoints hold the trained parameters only; the base is rebuilt
    by the callbacks on resume.

    Args:
        source: Folder, `asset:small_moe` or hub name of the model: dense (the callbacks cut and pack it) or pruned.
        dtype: Type of the weights that are not packed; `auto` keeps the stored one.
        expert_learning_rate: Peak rate of the adapters of routed and shared experts (paper A: 1e-4).
        router_learning_rate: Peak rate of the router's adapters (paper A: 1e-6).
        attention_learning_rate: Peak rate of attention adapters and norms, where there are any.
        optimizer: `adamw`, `adamw8bit` or `paged_adamw8bit` (the last needs a GPU).
        weight_decay: Decoupled weight decay.
        betas: Adam's decay rates.
        schedule: `linear` or `cosine` decay after the warmup, or `constant_with_warmup`.
        warmup_ratio: Share of the optimizer steps spent warming up.
        gradient_checkpointing: Recompute each decoder layer in backward; on at real sizes.
        teacher: Folder, asset or hub name of the unpruned model (16 bit or packed) to distil from; null: none.
        distillation: Weight of the distillation loss; the next-token loss has the rest.
    """

    def __init__(
        self,
        *,
        source: str,
        dtype: DtypeName = "auto",
        expert_learning_rate: float = 1e-4,
        router_learning_rate: float = 1e-6,
        attention_learning_rate: float = 1e-4,
        optimizer: OptimizerName = "adamw",
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        schedule: ScheduleName = "linear",
        warmup_ratio: float = 0.1,
        gradient_checkpointing: bool = True,
        teacher: str | None = None,
        distillation: float = 0.5,
    ) -> None:
        super().__init__(
            source=source,
            dtype=dtype,
            learning_rate=expert_learning_rate,
            optimizer=optimizer,
            weight_decay=weight_decay,
            betas=betas,
            schedule=schedule,
            warmup_ratio=warmup_ratio,
            gradient_checkpointing=gradient_checkpointing,
        )
        self.save_hyperparameters()
        self.strict_loading = False
        if not 0 < distillation <= 1:
            raise ValueError(f"`distillation` is the weight of the distillation loss, in (0, 1], got {distillation}.")
        self.teacher_source, self.distillation = teacher, distillation
        # A tuple, so that the teacher is no submodule: it is neither trained, saved nor wrapped.
        self._teacher: tuple[PreTrainedModel, ...] = ()
        self.learning_rates = {
            "experts": expert_learning_rate,
            "shared_experts": expert_learning_rate,
            "router": router_learning_rate,
            "attention": attention_learning_rate,
            "norms": attention_learning_rate,
        }

    @override
    def parameter_groups(self) -> list[dict[str, Any]]:
        """One group per kind of adapter, each at its own learning rate.

        Raises:
            ValueError: nothing is trainable: the `Recovery` callback is missing.
        """
        groups = trainable_groups(self.language_model)
        if not groups:
            raise ValueError("Nothing is trainable: put `callbacks.Recovery` into `trainer.callbacks`.")
        return [{"name": name, "params": group, "lr": self.learning_rates[name]} for name, group in groups.items()]

    @override
    def on_fit_start(self) -> None:
        """Loads the teacher, if there is one, beside the student."""
        super().on_fit_start()
        if self.teacher_source is not None:
            teacher = load_model(self.teacher_source, dtype=self.settings.dtype).to(self.device)  # pyright: ignore
            self._check_teacher(teacher)
            self._teacher = (teacher.requires_grad_(requires_grad=False),)

    def _check_teacher(self, teacher: PreTrainedModel) -> None:
        """The teacher must be the student before it was cut: same family, depth, width and vocabulary.

        Raises:
            ValueError: it is another model.
        """
        student, other = (model.config.get_text_config() for model in (self.language_model, teacher))
        for name in ("model_type", "num_hidden_layers", "hidden_size", "vocab_size"):
            mine, theirs = getattr(student, name), getattr(other, name)
            if mine != theirs:
                raise ValueError(
                    f"`teacher: {self.teacher_source}` is not the unpruned model of this student: `{name}` is "
                    f"{theirs} there and {mine} here. Name the model that was pruned, or leave `teacher` out."
                )

    @override
    def on_train_end(self) -> None:
        """Gives up the teacher: what follows needs the memory."""
        self._teacher = ()

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Next-token loss, mixed with the distillation loss where there is a teacher; nats per token."""
        if not self._teacher:
            return super().training_step(batch, batch_idx)
        outputs = self.language_model(**batch, use_cache=False)
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        with torch.no_grad():
            teacher_logits = self._teacher[0](**inputs, use_cache=False).logits
        distilled = distillation_loss(outputs.logits, teacher_logits, batch["labels"])
        self.log_dict({"train_loss": outputs.loss, "distillation_loss": distilled}, prog_bar=True)
        return (1 - self.distillation) * outputs.loss + self.distillation * distilled

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the trained parameters only."""
        trained = self._trained_shapes()
        checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name in trained}

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of other adapters: loading is not strict, since the frozen weights are not in it.

        Raises:
            ValueError: a trained parameter is missing, has no place, or has another shape.
        """
        stored = {name: tuple(value.shape) for name, value in checkpoint["state_dict"].items()}
        present = self._trained_shapes()
        odd = sorted(name for name in stored.keys() | present.keys() if stored.get(name) != present.get(name))
        if odd:
            raise ValueError(
                f"The checkpoint holds other adapters than the model: '{odd[0]}' is {stored.get(odd[0])} there and "
                f"{present.get(odd[0])} here (None: absent). Run `fit` or `validate` with the callbacks and settings "
                "it was trained with; to use the model elsewhere, load what ExportPruned wrote."
            )

    def _trained_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(parameter.shape) for name, parameter in self.named_parameters() if parameter.requires_grad}


def _set_router_loss(model: PreTrainedModel, coefficient: float) -> None:
    """Sets the coefficient that the model took from its config when it was built.

    Raises:
        ValueError: this family has no load-balancing loss in transformers.
    """
    if "router_aux_loss_coef" not in vars(model):
        raise ValueError(
            f"transformers has no load-balancing loss for '{model.config.model_type}'. Set `router_loss` to 0."
        )
    model.router_aux_loss_coef = coefficient  # pyright: ignore[reportArgumentType]: a plain number, no module
    model.config.router_aux_loss_coef = coefficient
