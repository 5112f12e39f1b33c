"""One-shot cuts in several stages, with a calibration of the cut and repaired model before each next one.

C channels of a layer.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from transformers import PreTrainedModel

from lightning_moe.allocation.budget import check_count, check_prune_ratio
from lightning_moe.allocation.methods import PruningMethod
from lightning_moe.calibration.collector import Batch, collect_statistics
from lightning_moe.calibration.processes import ALONE, Processes
from lightning_moe.models.discovery import model_shape
from lightning_moe.records import CalibrationStatistics, ModelShape, PrunePlan
from lightning_moe.surgery.pruner import ScheduledPruner
from lightning_moe.surgery.repair import Repair, has_rows_to_fit, plan_repair


@dataclass(frozen=True, kw_only=True, eq=False)
class StagedCut:
    """What was done.

    Args:
        plan: all stages as one plan of the model as it was given: `apply_plan` of it cuts the same channels.
        stages: the plan of each stage, of the model as it was then.
    """

    plan: PrunePlan
    stages: tuple[PrunePlan, ...]


def cut_in_stages(
    model: PreTrainedModel,
    *,
    method: str | PruningMethod,
    prune_ratio: float,
    statistics: CalibrationStatistics,
    loaders: Mapping[str, Iterable[Batch]],
    method_args: Mapping[str, Any] | None = None,
    stages: int = 2,
    repair: bool | Literal["after_nf4"] = True,
    memory_gb: float = 4.0,
    moments: bool = True,
    progress: bool = True,
    processes: Processes = ALONE,
) -> StagedCut:
    """Cuts a model, in place, in equal steps up to `prune_ratio`; each stage decides on what the one before left.

    Ratios count from the unpruned model, so that the last stage ends with exactly the channels of a cut in one go. A
    repair fits each stage's rows to the model as that stage found it: errors of the stages add up.

    Args:
        model: the model that the statistics are of.
        method: name of a method, or an object.
        prune_ratio: share of the channels that is gone in the end, in (0, 1).
        statistics: of the model as it is, for the first stage.
        loaders: corpus name -> batches; read once for every further stage and once for every repair, so nothing that
            can be read only once.
        method_args: settings of a method given by name.
        stages: how many.
        repair: refit the down projections after each stage; `after_nf4` fits the last time to 4-bit weights
            (`plan_repair`).
        memory_gb: GiB for the Gram matrices of a repair.
        moments: gather the [E, H] and [E, E] sums again before every stage, which some expert criteria want.
        progress: show progress bars.
        processes: those that share the work.

    Raises:
        ValueError: no stages, a ratio outside (0, 1), or what method, statistics, repair or loaders are refused for.
    """
    check_count(stages, name="stages", lowest=1)
    check_prune_ratio(prune_ratio)
    if prune_ratio == 0:
        raise ValueError("`prune_ratio` of a cut in stages must be in (0, 1), got 0: there is nothing to cut.")
    shape, last = model_shape(model), stages - 1
    steps = [(stage, prune_ratio * (stage + 1) / stages) for stage in range(stages)]
    pruner = ScheduledPruner(model, schedule=steps, method=method, method_args=method_args, processes=processes)
    shared: dict[str, Any] = {"loaders": loaders, "progress": progress, "processes": processes}
    for stage, ratio in steps:
        if stage:
            statistics = collect_statistics(model, moments=moments, **shared)
        after_nf4 = repair == "after_nf4" and stage == last
        fit = partial(_fit, model, memory_gb=memory_gb, after_nf4=after_nf4, **shared)
        pruner.cut(statistics, prune_ratio=ratio, optimizers=(), repair=fit if repair else None)
    plan = compose_plans(pruner.plans, shape=shape, prune_ratio=prune_ratio)
    return StagedCut(plan=plan, stages=tuple(pruner.plans))


def _fit(model: PreTrainedModel, plan: PrunePlan, *, after_nf4: bool, **options: Any) -> Repair | None:
    if not has_rows_to_fit(plan, after_nf4=after_nf4):
        return None
    return plan_repair(model, plan=plan, after_nf4=after_nf4, **options)


def compose_plans(plans: Sequence[PrunePlan], *, shape: ModelShape, prune_ratio: float) -> PrunePlan:
    """Plans that were applied one after the other, as one plan of the model of the first.

    Its provenance is that of the last, with the `statistics` of the first, which are of the same model; `stages` is a
    JSON list of the ratio and the statistics of each.

    Args:
        plans: at least one, each made by a method.
        shape: of the model before the first.
        prune_ratio: what the result says was asked for.
    """
    keep = tuple(keep_C.clone() for keep_C in plans[0].keep)
    for plan in plans[1:]:
        for total_C, keep_C in zip(keep, plan.keep, strict=True):
            total_C[total_C.clone()] = keep_C
    digests = [plan.provenance["statistics"] for plan in plans]
    stages = [
        {"prune_ratio": plan.prune_ratio, "statistics": digest} for plan, digest in zip(plans, digests, strict=True)
    ]
    provenance = {**plans[-1].provenance, "statistics": digests[0], "stages": json.dumps(stages)}
    return replace(plans[-1], shape=shape, prune_ratio=prune_ratio, keep=keep, provenance=provenance)
