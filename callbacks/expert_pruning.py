"""ExpertPruning: whole experts leave, once before training or at configured steps of it."""

import logging
from typing import Any

from lightning import LightningModule, Trainer
from typing_extensions import override

from callbacks._pruning import Pruning
from callbacks._settings import one_given
from callbacks._trainer import find_callback, language_model
from callbacks.calibration import ExpertCalibration
from lightning_moe.allocation import build_method
from lightning_moe.allocation.budget import resolve_prune_ratio
from lightning_moe.allocation.methods import ExpertMethod
from lightning_moe.records import PrunePlan
from lightning_moe.surgery.cut import apply_plan
from lightning_moe.surgery.feasibility import remaining_ratio
from lightning_moe.surgery.schedule import GradualSchedule

log = logging.getLogger(__name__)


class ExpertPruning(Pruning):
    """Drops whole experts, the lowest-scored of each layer, with their router rows.

    Give exactly one of `prune_ratio` or `keep_ratio` (one cut before training) and `schedule` (cuts at steps of
    training). Needs an `ExpertCalibration` before it in the list; may stand beside `ChannelPruning`, in any order.
    Ratios are the share of the unpruned model's channels that is gone from then on, whichever callback removed them,
    met to the nearest whole expert of each layer.

    Args:
        prune_ratio: Share of routed-expert channels to remove before training, in [0, 1); met to the nearest whole
            expert of each layer.
        keep_ratio: Share that stays, in (0, 1]: 1 - `prune_ratio`.
        schedule: `[[step, prune_ratio], ...]`, ascending, or a curve: `{shape: cubic, begin: 100, end: 1000, num_cuts:
            5, prune_ratio: 0.5}`. Steps are Lightning's global_step; with several optimizers under manual
            optimization each optimizer.step() counts.
        method: One that cuts whole experts: `reap`, `tb_coverage` (paper B), `expert_sparsity`, `random`, `frequency`,
            `router_weight`, `router_probability`, `man`, `msan`, `mone`, `aimer`, or `expert_dropping`.
        method_args: Settings of the method, for example `{criterion: ablation}`.
        save_plan: Where the plan is written (of a schedule, the last one).
    """

    def __init__(
        self,
        *,
        prune_ratio: float | None = None,
        keep_ratio: float | None = None,
        schedule: list[tuple[int, float]] | GradualSchedule | None = None,
        method: str = "reap",
        method_args: dict[str, Any] | None = None,
        save_plan: str | None = None,
    ) -> None:
        ratios = {"prune_ratio": prune_ratio, "keep_ratio": keep_ratio}
        one_given(ratios | {"schedule": schedule})
        built = build_method(method, **(method_args or {}))
        if not isinstance(built, ExpertMethod):
            raise ValueError(f"ExpertPruning needs a method that drops whole experts, such as 'reap', got '{method}'.")
        super().__init__(
            prune_ratio=resolve_prune_ratio(**ratios) if schedule is None else None,
            schedule=schedule,
            method=built,
            save_plan=save_plan,
        )

    @override
    def cut_before_training(self, trainer: Trainer, pl_module: LightningModule) -> PrunePlan:
        """Plans on the statistics of the model as it is, and cuts."""
        assert self.prune_ratio is not None
        model = language_model(pl_module)
        statistics = find_callback(trainer, ExpertCalibration, before=self).statistics_of(trainer, pl_module)
        ratio = remaining_ratio(model, prune_ratio=self.prune_ratio)
        log.info("Prune ratio %.4g, met to the nearest whole expert of each layer.", self.prune_ratio)
        plan: PrunePlan = trainer.strategy.broadcast(self.method.plan(statistics, prune_ratio=ratio))
        apply_plan(model, plan=plan)
        return plan
