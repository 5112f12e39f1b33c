"""ChannelPruning: decide and cut, once before training or at configured steps of it."""

import logging
from collections.abc import Sequence
from typing import Any

from lightning import Callback, LightningModule, Trainer
from typing_extensions import override

from callbacks._trainer import find_callback, language_model
from callbacks.calibration import ExpertCalibration
from lightning_moe.allocation import build_method
from lightning_moe.models.discovery import model_shape
from lightning_moe.records import PrunePlan
from lightning_moe.surgery.cut import apply_plan, convert_experts
from lightning_moe.surgery.optimizer_state import follow_cut
from lightning_moe.surgery.repair import plan_repair
from lightning_moe.surgery.schedule import PruneSchedule

log = logging.getLogger(__name__)


class ChannelPruning(Callback):
    """Cuts channels inside experts, and experts that lose all of them, out of any transformers MoE in the module.

    Give exactly one of `prune_ratio` (one cut before training), `schedule` (cuts at steps of training; each
    recalibrates on the model as it is then) and `plan_file` (a plan made earlier). Needs an `ExpertCalibration` before
    it in the list, except with a plan and no repair.

    Args:
        prune_ratio: Share of routed-expert channels to remove before training, in [0, 1).
        schedule: `[[step, prune_ratio], ...]`, ascending; ratios count from the unpruned model. One device, not 4 bit.
        plan_file: A saved PrunePlan.
        method: `exact_global` (ours), `paper_a`, `uniform` or `reap`.
        method_args: Settings of the method, for example `{align: 64}`.
        repair: Refit the down projections by least squares (a second calibration pass). One-shot only.
        repair_memory_gb: Memory for the Gram matrices of the repair; more passes where it does not suffice.
        save_plan: Where the plan is written.
    """

    def __init__(
        self,
        *,
        prune_ratio: float | None = None,
        schedule: list[tuple[int, float]] | None = None,
        plan_file: str | None = None,
        method: str = "exact_global",
        method_args: dict[str, Any] | None = None,
        repair: bool = True,
        repair_memory_gb: float = 4.0,
        save_plan: str | None = None,
    ) -> None:
        given = {"prune_ratio": prune_ratio, "schedule": schedule, "plan_file": plan_file}
        if sum(value is not None for value in given.values()) != 1:
            raise ValueError(f"Give exactly one of `prune_ratio`, `schedule` and `plan_file`, got {given}.")
        self.prune_ratio = prune_ratio
        self.plan_file = plan_file
        self.schedule = None if schedule is None else PruneSchedule(cuts=tuple((s, r) for s, r in schedule))
        self.method = build_method(method, **(method_args or {}))
        self.repair = repair
        self.repair_memory_gb = repair_memory_gb
        self.save_plan = save_plan
        self.plans: list[PrunePlan] = []
        self._num_channels: int | None = None
        self._num_cuts = 0

    @property
    def state_key(self) -> str:
        """Two schedules in one trainer keep their states apart."""
        return self._generate_state_key(schedule=str(self.schedule), plan=self.plan_file, ratio=self.prune_ratio)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """One-shot: plan and cut before optimizers exist. Scheduled: full-width ChannelExperts, ready for cuts."""
        if self._num_channels is not None:
            return
        model = language_model(pl_module)
        self._num_channels = model_shape(model).num_channels
        if self.schedule is not None:
            self.schedule.check_trainer(num_devices=trainer.world_size)
            convert_experts(model)
            return
        plan = self._one_shot_plan(trainer)
        self._keep(plan)
        repair = None
        if self.repair and plan.num_kept < plan.shape.num_channels:
            calibration = find_callback(trainer, ExpertCalibration, before=self)
            loaders = calibration.loaders(trainer, pl_module)
            repair = plan_repair(model, plan=plan, loaders=loaders, memory_gb=self.repair_memory_gb)
        apply_plan(model, plan=plan, repair=repair)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Scheduled: cut when the step is reached (before the batch, between optimizer steps)."""
        if self.schedule is None or self._num_channels is None:
            return
        due = self.schedule.due(step=trainer.global_step, num_done=self._num_cuts)
        if due is None:
            return
        self._num_cuts, prune_ratio = due
        self._cut_now(trainer, pl_module, prune_ratio=prune_ratio)

    @override
    def state_dict(self) -> dict[str, Any]:
        """How many cuts of the schedule are behind us."""
        return {"num_cuts": self._num_cuts}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume after the cuts that were made."""
        self._num_cuts = int(state_dict["num_cuts"])

    def _one_shot_plan(self, trainer: Trainer) -> PrunePlan:
        if self.plan_file is not None:
            return PrunePlan.load(self.plan_file)
        calibration = find_callback(trainer, ExpertCalibration, before=self)
        if calibration.statistics is None or self.prune_ratio is None:
            raise ValueError("ExpertCalibration has no statistics: its `setup` must run before ChannelPruning's.")
        return self.method.plan(calibration.statistics, prune_ratio=self.prune_ratio)

    def _cut_now(self, trainer: Trainer, pl_module: LightningModule, *, prune_ratio: float) -> None:
        """Recalibrate, plan, cut, and let the optimizers follow."""
        model = language_model(pl_module)
        calibration = find_callback(trainer, ExpertCalibration, before=self)
        statistics = calibration.collect(trainer, pl_module)
        now = statistics.shape.num_channels
        plan = self.method.plan(statistics, prune_ratio=1 - (1 - prune_ratio) * (self._num_channels or now) / now)
        self._keep(plan)
        for optimizer in trainer.optimizers:
            optimizer.zero_grad(set_to_none=True)
        follow_cut(trainer.optimizers, replaced=apply_plan(model, plan=plan))
        log.info("Step %d: cut to %d of %d channels.", trainer.global_step, plan.num_kept, self._num_channels)

    def _keep(self, plan: PrunePlan) -> None:
        self.plans.append(plan)
        if self.save_plan is not None:
            plan.save(self.save_plan)


def last_plan(callbacks: Sequence[Callback]) -> PrunePlan | None:
    """The newest plan that any ChannelPruning of the list has made."""
    plans = [plan for callback in callbacks if isinstance(callback, ChannelPruning) for plan in callback.plans]
    return plans[-1] if plans else None
