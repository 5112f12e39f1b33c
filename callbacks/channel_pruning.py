"""ChannelPruning: decide and cut, once before training or at configured steps of it."""

import logging
from numbers import Real
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from transformers import PreTrainedModel
from typing_extensions import override

from callbacks._pruning import Pruning, prunings
from callbacks._settings import one_given
from callbacks._strategy import processes
from callbacks._trainer import find_callback, language_model
from callbacks.calibration import ExpertCalibration
from lightning_moe.allocation import build_method
from lightning_moe.allocation.budget import resolve_prune_ratio
from lightning_moe.records import CalibrationStatistics, PrunePlan
from lightning_moe.surgery.cut import apply_plan
from lightning_moe.surgery.feasibility import remaining_ratio, unpruned_shape
from lightning_moe.surgery.repair import plan_repair
from lightning_moe.surgery.schedule import GradualSchedule

log = logging.getLogger(__name__)

__all__ = ["ChannelPruning", "prunings"]


class ChannelPruning(Pruning):
    """Cuts channels inside experts, and experts that lose all of them, out of any transformers MoE in the module.

    Give exactly one of `prune_ratio` or `keep_ratio` (one cut before training), `schedule` (cuts at steps of training;
    each recalibrates on the model as it is then, 4-bit experts and adapters included) and `plan_file` (a plan made
    earlier). Needs an `ExpertCalibration` before it in the list, except with a plan and no repair. Ratios are the
    share of the unpruned model's channels that is gone from then on, whichever callback removed them.

    Args:
        prune_ratio: Share of routed-expert channels to remove before training, in [0, 1).
        keep_ratio: Share that stays, in (0, 1]: 1 - `prune_ratio`.
        schedule: `[[step, prune_ratio], ...]`, ascending, or a curve: `{shape: cubic, begin: 100, end: 1000, num_cuts:
            5, prune_ratio: 0.5}`. Steps are Lightning's global_step; with several optimizers under manual
            optimization each optimizer.step() counts.
        plan_file: A saved PrunePlan.
        method: `exact_global`, `channel_coverage` (ours), `paper_a`, `tb_coverage` (paper B), `uniform`, `wanda`,
            `reap`, or another name of `plan --method`.
        method_args: Settings of the method, for example `{align: 64}`.
        repair: Refit the down projections by least squares (a second calibration pass), for a cut before training; the
            cuts of a schedule are made without.
        repair_memory_gb: GiB for the Gram matrices of the repair; more passes where they do not suffice.
        save_plan: Where the plan is written (of a schedule, the last one).
    """

    def __init__(
        self,
        *,
        prune_ratio: float | None = None,
        keep_ratio: float | None = None,
        schedule: list[tuple[int, float]] | GradualSchedule | None = None,
        plan_file: str | None = None,
        method: str = "exact_global",
        method_args: dict[str, Any] | None = None,
        repair: bool = True,
        repair_memory_gb: float = 4.0,
        save_plan: str | None = None,
    ) -> None:
        ratios = {"prune_ratio": prune_ratio, "keep_ratio": keep_ratio}
        one_given(ratios | {"schedule": schedule, "plan_file": plan_file})
        if isinstance(repair_memory_gb, bool) or not isinstance(repair_memory_gb, Real) or not repair_memory_gb > 0:
            raise ValueError(f"`repair_memory_gb` must be a number of GB above 0, got {repair_memory_gb!r}.")
        one_shot = schedule is None and plan_file is None
        super().__init__(
            prune_ratio=resolve_prune_ratio(**ratios) if one_shot else None,
            schedule=schedule,
            method=build_method(method, **(method_args or {})),
            save_plan=save_plan,
        )
        self.plan_file = plan_file
        self.repair = repair
        self.repair_memory_gb = repair_memory_gb

    @override
    def needs_text(self, statistics: CalibrationStatistics | None) -> bool:
        """For the repair, and for a plan that is not given."""
        return self.repair or (self.plan_file is None and statistics is None)

    @override
    def _told_apart_by(self) -> dict[str, Any]:
        return super()._told_apart_by() | {"plan": self.plan_file}

    @override
    def _prepare(self, trainer: Trainer, model: PreTrainedModel) -> None:
        super()._prepare(trainer, model)
        if self.repair:
            log.info(
                "The cuts of the schedule are made without a repair, which `repair: true` is for a cut before training "
                "only: training follows each of them."
            )

    @override
    def cut_before_training(self, trainer: Trainer, pl_module: LightningModule) -> PrunePlan:
        """Plans or loads the plan, refits the down projections, and cuts."""
        model = language_model(pl_module)
        plan: PrunePlan = trainer.strategy.broadcast(self._one_shot_plan(trainer, pl_module))
        repair = None
        if self.repair and plan.num_kept < plan.shape.num_channels:
            loaders = find_callback(trainer, ExpertCalibration, before=self).loaders(trainer)
            with isolate_rng():
                repair = plan_repair(
                    model, plan=plan, loaders=loaders, memory_gb=self.repair_memory_gb, processes=processes(trainer)
                )
        apply_plan(model, plan=plan, repair=repair)
        return plan

    def _one_shot_plan(self, trainer: Trainer, pl_module: LightningModule) -> PrunePlan:
        if self.plan_file is not None:
            return PrunePlan.load(self.plan_file)
        assert self.prune_ratio is not None
        statistics = find_callback(trainer, ExpertCalibration, before=self).statistics_of(trainer, pl_module)
        model = language_model(pl_module)
        method = self.method.resolved(unpruned_shape(model))
        return method.plan(statistics, prune_ratio=remaining_ratio(model, prune_ratio=self.prune_ratio))
