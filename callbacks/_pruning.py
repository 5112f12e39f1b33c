"""What the pruning callbacks share: one cut before training or a schedule, and how a checkpoint goes on."""

import logging
from abc import abstractmethod
from dataclasses import asdict
from functools import partial
from typing import Any

from lightning import LightningModule, Trainer
from transformers import PreTrainedModel
from typing_extensions import override

from callbacks._averaging import check_averaging
from callbacks._resumed import check_resumed
from callbacks._statistics import StatisticsUser
from callbacks._strategy import check_strategy, check_whole, processes, wrap_again
from callbacks._trainer import (
    callbacks_of,
    find_callback,
    find_optional,
    is_first_setup,
    language_model,
    resumed_checkpoint,
    state_key_of,
)
from callbacks.calibration import ExpertCalibration
from callbacks.exact_resume import resume_exactly
from lightning_moe.allocation.methods import PruningMethod
from lightning_moe.records import CalibrationStatistics, PrunePlan
from lightning_moe.surgery.pruner import ScheduledPruner
from lightning_moe.surgery.schedule import Schedule, build_schedule
from lightning_moe.training.checkpoint import restore_cut, write_structure
from lightning_moe.training.sharding import is_sharded

log = logging.getLogger(__name__)
_BEYOND_END = (
    "The schedule of %s goes from step %d to step %d and training ends at step %d: cuts from there on are not made."
)
_WAITS = (
    "This loop runs on the model without the cut of %s, which `fit` makes: training batches to calibrate on are there "
    "only. To cut now, give `data.calibration`, a `file` that exists (with `repair: false`) or `ckpt_path`."
)


class Pruning(StatisticsUser):
    """Base of the pruning callbacks; a subclass says how it cuts before training."""

    def __init__(
        self, *, prune_ratio: float | None, schedule: Schedule | None, method: PruningMethod, save_plan: str | None
    ) -> None:
        self.prune_ratio = prune_ratio
        self.schedule = None if schedule is None else build_schedule(schedule)
        self.method = method
        self.save_plan = save_plan
        self.plans: list[PrunePlan] = []
        self._model: PreTrainedModel | None = None
        self._pruner: ScheduledPruner | None = None

    @abstractmethod
    def cut_before_training(self, trainer: Trainer, pl_module: LightningModule) -> PrunePlan:
        """One-shot: plans and cuts the model."""

    @property
    @override
    def in_training(self) -> bool:
        """Whether it cuts at steps of training."""
        return self.schedule is not None

    @property
    def requested_ratio(self) -> float:
        """The share of the unpruned model's channels that was to be gone by now."""
        if self._pruner is not None:
            return self._pruner.reached_ratio
        if self.prune_ratio is not None:
            return self.prune_ratio
        return self.plans[-1].prune_ratio if self.plans else 0.0

    def needs_text(self, statistics: CalibrationStatistics | None) -> bool:
        """Whether one-shot has to run text through the model, with these statistics at hand."""
        return statistics is None

    @property
    def state_key(self) -> str:
        """Two of a kind in one trainer keep their states apart."""
        return state_key_of(self, **self._told_apart_by())

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """One-shot: cut before optimizers exist. Scheduled: full-width experts. Resumed: the checkpoint's cut."""
        check_strategy(trainer, scheduled=self.in_training)
        check_averaging(trainer, self, scheduled=self.in_training)
        resume_exactly(trainer)
        model, checkpoint = language_model(pl_module), resumed_checkpoint(trainer)
        if first := is_first_setup(self, model=model, done=self._model):
            check_whole(model)
        if checkpoint is not None and not is_sharded(model):
            check_resumed(self, checkpoint, required=True)
            restore_cut(checkpoint, model=model)  # refuses one from before a cut that this model has behind it
        if not first:
            return
        if self.schedule is not None:
            self._prepare(trainer, model)
        elif checkpoint is None and waits_for_fit(trainer):
            log.warning(_WAITS, type(self).__name__)
            return
        elif checkpoint is None:
            self._keep(self.cut_before_training(trainer, pl_module), trainer=trainer)
        self._model = model

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The model must be the one that was cut, and optimizers must be able to follow."""
        is_first_setup(self, model=language_model(pl_module), done=self._model)
        if self._pruner is not None:
            self._pruner.check_optimizers(trainer.optimizers)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says which cuts of a schedule will not be reached."""
        if self.schedule is not None:
            # Steps of several optimizers in manual optimization count one by one: their number is not known.
            end = trainer.estimated_stepping_batches if pl_module.automatic_optimization else trainer.max_steps
            first, last = self.schedule.cuts[0][0], self.schedule.cuts[-1][0]
            if 0 <= end <= last:
                log.warning(_BEYOND_END, type(self).__name__, first, last, end)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Scheduled: cut when the step is reached (before the batch, between optimizer steps)."""
        if self._pruner is None:
            return
        calibration = find_callback(trainer, ExpertCalibration, before=self)
        plan = self._pruner.step(
            trainer.global_step,
            optimizers=trainer.optimizers,
            statistics=partial(calibration.collect_in_training, trainer, pl_module),
        )
        if plan is not None:
            wrap_again(trainer)
            self._keep(plan, trainer=trainer)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Notes the structure of the model, whosever module it is in."""
        write_structure(checkpoint, model=language_model(pl_module))

    @override
    def state_dict(self) -> dict[str, Any]:
        """The plans that were carried out, how far a schedule is, and the settings."""
        if self._pruner is not None:
            return self._pruner.state_dict()
        return {"plans": [plan.to_dict() for plan in self.plans], "settings": self._settings()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """On resume, after the weights: the plans and the schedule's progress; the model was cut in `setup`."""
        if self._pruner is not None:
            self._pruner.load_state_dict(state_dict)
        elif state_dict["settings"] != self._settings():
            raise ValueError(
                f"The checkpoint was made with the pruning settings {state_dict['settings']}, got {self._settings()}. "
                "Resume with those."
            )
        self.plans = [PrunePlan.from_dict(plan) for plan in state_dict["plans"]]

    def _told_apart_by(self) -> dict[str, Any]:
        return {"schedule": None if self.schedule is None else self.schedule.cuts, "ratio": self.prune_ratio}

    def _waits(self, trainer: Trainer) -> bool:
        calibration = None if self._model is not None or self.in_training else find_optional(trainer, ExpertCalibration)
        return calibration is not None and not calibration.has_text(trainer) and self.needs_text(calibration.statistics)

    def _settings(self) -> dict[str, Any]:
        return {"prune_ratio": self.prune_ratio, "method": self.method.name, "method_args": asdict(self.method)}

    def _prepare(self, trainer: Trainer, model: PreTrainedModel) -> None:
        assert self.schedule is not None
        calibration = find_callback(trainer, ExpertCalibration, before=self)
        if self.schedule.cuts[0][0] == 0 and calibration.window is not None:
            raise ValueError(
                f"`schedule` cuts at step 0, and `window: {calibration.window}` has seen no batch by then. Begin at "
                "step 1 or later, or calibrate on `data.calibration`."
            )
        self._pruner = ScheduledPruner(model, schedule=self.schedule, method=self.method, processes=processes(trainer))

    def _keep(self, plan: PrunePlan, *, trainer: Trainer) -> None:
        self.plans.append(plan)
        if self.save_plan is not None and trainer.is_global_zero:
            plan.save(self.save_plan)


def waits_for_fit(trainer: Trainer) -> bool:
    """Whether a one-shot cut, and what comes after it, must wait for the training batches of `fit`."""
    return resumed_checkpoint(trainer) is None and any(pruning._waits(trainer) for pruning in prunings(trainer))


def prunings(trainer: Trainer) -> list[Pruning]:
    """Every pruning callback of the trainer's list."""
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, Pruning)]
