"""LightningModules: a language model trained whole, and one recovered through its adapters.

B sequences, S positions, V vocabulary.
"""

from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import override

from lightning_moe.adapters.groups import trainable_groups
from lightning_moe.calibration.text import vocab_size
from lightning_moe.models.loading import DtypeName
from lightning_moe.training.batches import model_inputs
from lightning_moe.training.best_checkpoint import check_best, restore_best
from lightning_moe.training.checkpoint import complete_state, keep_learned, restore_structure, write_structure
from lightning_moe.training.checkpoint_files import CheckpointedModule
from lightning_moe.training.data import TextDataModule
from lightning_moe.training.distillation import Teacher, TeacherQuantize, TeacherSettings
from lightning_moe.training.finite import FiniteModule
from lightning_moe.training.hyperparameters import check_folder, name_folders
from lightning_moe.training.losses import next_token_loss, weight_among_processes
from lightning_moe.training.model_source import ModelSource, processes_of, trainer_of
from lightning_moe.training.optim import OptimizerName, ScheduleName, build_optimizer, build_schedule
from lightning_moe.training.optimizer_names import name_optimizer_states
from lightning_moe.training.recomputation import recompute_layers
from lightning_moe.training.router_loss import RouterLogits, load_balancing_loss
from lightning_moe.training.settings import TrainingSettings, check_rates
from lightning_moe.training.teacher_logits import TeacherLogits
from lightning_moe.training.validation import ValidatedModule

# Settings of a recovery that are learning rates.
_RATES = ("expert_learning_rate", "router_learning_rate", "attention_learning_rate")


class LanguageModelModule(CheckpointedModule, ValidatedModule, FiniteModule):
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
        router_loss: Coefficient of the load-balancing loss, layer by layer; 0 leaves it out.
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
        check_folder(source)
        check_rates(learning_rate=learning_rate)
        self.save_hyperparameters()
        name_folders(self, "source")
        self.settings = TrainingSettings(
            dtype=dtype,
            optimizer=optimizer,
            weight_decay=weight_decay,
            betas=betas,
            schedule=schedule,
            warmup_ratio=warmup_ratio,
            router_loss=router_loss,
            gradient_checkpointing=gradient_checkpointing,
        )
        self.learning_rate = learning_rate
        self.model: PreTrainedModel | None = None
        self._source = ModelSource(source, dtype=dtype, from_scratch=from_scratch)

    @property
    @override
    def language_model(self) -> PreTrainedModel:
        """The loaded model; `configure_model` must have run."""
        if self.model is None:
            raise ValueError("The model is not loaded yet: call `configure_model()` first.")
        return self.model

    @override
    def configure_model(self) -> None:
        """Loads the model, once, and shards it where the strategy has a device mesh (FSDP2)."""
        self.load_language_model(in_shares=True)
        self._source.distribute(self.language_model, module=self, mesh=self.device_mesh)

    def load_language_model(self, *, in_shares: bool = False) -> None:
        """Loads the model into this process; later calls change nothing.

        Args:
            in_shares: under FSDP2, expert rows of a pruned folder wait for `configure_model`, where each process reads
                its share of them.
        """
        if self.model is not None:
            return
        sharded = in_shares and self.device_mesh is not None
        self.model = self._source.load(processes=processes_of(self), in_shares=sharded)
        self._check_text()
        if self.settings.gradient_checkpointing:
            recompute_layers(self.model)

    def _check_text(self) -> None:
        """Before anything is run: the model must know every token of our data module's rows."""
        trainer: Any = trainer_of(self)
        datamodule = None if trainer is None else trainer.datamodule
        if isinstance(datamodule, TextDataModule):
            datamodule.check_vocabulary(vocab_size=vocab_size(self.language_model))

    @override
    def on_fit_start(self) -> None:
        """Pretrained models come in eval mode and Lightning keeps that; training wants `train()`."""
        self.language_model.train()

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The objective of the batch, in nats per token, and the routers' loss where it has a coefficient.

        Strategies average gradients over processes; the objective is weighted so that this gives the mean over all
        tokens that count, however they are spread.
        """
        inputs, weight = model_inputs(batch), weight_among_processes(batch["labels"])
        if not self.settings.router_loss:
            return weight * self.objective(self.language_model(**inputs, use_cache=False).logits, batch)
        with RouterLogits(self.language_model) as routers:
            logits_BSV = self.language_model(**inputs, use_cache=False).logits
        balance = load_balancing_loss(routers.outputs, attention_mask=batch.get("attention_mask"))
        self.log("router_loss", balance)
        return weight * self.objective(logits_BSV, batch) + self.settings.router_loss * balance

    def objective(self, logits_BSV: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Mean next-token loss, a scalar in nats per token."""
        loss = next_token_loss(logits_BSV, batch["labels"])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Notes the structure of the model, so that loading needs nothing but the checkpoint and the source."""
        super().on_save_checkpoint(checkpoint)
        write_structure(checkpoint, model=self.language_model)
        if "optimizer_states" in checkpoint:
            name_optimizer_states(checkpoint, module=self, optimizers=self.trainer.optimizers)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Loads the source and gives it the structure of the checkpoint; Lightning loads the weights after this."""
        self.load_language_model()
        restore_structure(checkpoint, model=self.language_model)

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
        router_loss: Coefficient of the load-balancing loss, layer by layer; 0 leaves it out.
        gradient_checkpointing: Recompute each decoder layer in backward; on at real sizes.
        teacher: Folder, asset or hub name of the unpruned model to distil from, whole on every device; null: none.
        teacher_quantize: `nf4` packs the teacher as it is loaded; `none` takes it as it is stored.
        teacher_logits: Folder that `teach` wrote for these training corpora: distil from disk, in place of `teacher`.
        distillation: Weight of the distillation loss, where there is a teacher; the next-token loss has the rest.
        restore_best: End with the weights of the best checkpoint; needs a ModelCheckpoint that monitors `nll`.
    """

    # No submodule: a teacher is neither trained, saved nor wrapped.
    _teacher: Teacher | None = None
    _logits: TeacherLogits | None = None

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
        router_loss: float = 0.0,
        gradient_checkpointing: bool = True,
        teacher: str | None = None,
        teacher_quantize: TeacherQuantize = "none",
        teacher_logits: str | None = None,
        distillation: float = 0.5,
        restore_best: bool = False,
    ) -> None:
        rates = (expert_learning_rate, router_learning_rate, attention_learning_rate)
        check_rates(**dict(zip(_RATES, rates, strict=True)))
        super().__init__(
            source=source,
            dtype=dtype,
            learning_rate=expert_learning_rate,
            optimizer=optimizer,
            weight_decay=weight_decay,
            betas=betas,
            schedule=schedule,
            warmup_ratio=warmup_ratio,
            router_loss=router_loss,
            gradient_checkpointing=gradient_checkpointing,
        )
        self.save_hyperparameters()
        name_folders(self, "source", "teacher", "teacher_logits")
        self.strict_loading, self.restore_best = False, restore_best
        self.teaching = TeacherSettings(
            source=teacher, quantize=teacher_quantize, logits=teacher_logits, weight=distillation
        )
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
    def prepare_data(self) -> None:
        """First of all: targets on disk that are not there must not cost a calibration."""
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.teaching.open_logits()

    @override
    def setup(self, stage: str) -> None:
        """Before the loaders are made: targets on disk go along with the training rows."""
        if stage != "fit":
            return
        if self.restore_best:
            check_best(self.trainer)
        self._logits = self.teaching.open_logits()
        datamodule: Any = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(datamodule, TextDataModule):
            datamodule.attach_teacher(self._logits)
        elif self._logits is not None:
            raise ValueError("`teacher_logits` belong to the rows of a TextDataModule: train with one.")

    @override
    def on_fit_start(self) -> None:
        """Loads the teacher, if there is one, beside the student."""
        super().on_fit_start()
        self._teacher = self.teaching.teacher_for(
            self.language_model,
            dtype=self.settings.dtype,
            device=self.device,
            logits=self._logits,
            processes=processes_of(self),
        )

    @override
    def on_train_end(self) -> None:
        """Gives up the teacher, since what follows needs the memory, and goes back to the best weights if asked to."""
        self._teacher = None
        if self.restore_best:
            restore_best(self.trainer, module=self)

    @override
    def objective(self, logits_BSV: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Next-token loss, mixed with the distillation loss where there is a teacher."""
        if self._teacher is None:
            return super().objective(logits_BSV, batch)
        weight = self.teaching.weight
        distilled = self._teacher.loss(logits_BSV, batch)
        with torch.set_grad_enabled(weight < 1):  # otherwise it is only logged
            loss = next_token_loss(logits_BSV, batch["labels"])
        self.log_dict({"train_loss": loss, "distillation_loss": distilled}, prog_bar=True)
        return (1 - weight) * loss + weight * distilled

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps what was learned: the trained parameters, and down rows that a repair fitted."""
        super().on_save_checkpoint(checkpoint)
        keep_learned(checkpoint, module=self, model=self.language_model)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Loads the source, gives it the structure of the checkpoint, and puts the frozen weights beside the learned.

        Raises:
            ValueError: the checkpoint is of another source, cut or adapter, or damaged.
        """
        super().on_load_checkpoint(checkpoint)
        complete_state(checkpoint, module=self, model=self.language_model)
