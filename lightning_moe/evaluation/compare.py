"""One-shot methods side by side: each is cut, saved, reloaded from disk and evaluated."""

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_moe.allocation import build_method
from lightning_moe.evaluation.stages import Stage, evaluate_stage, save_stage
from lightning_moe.export.huggingface import save_ragged
from lightning_moe.models.loading import load_model
from lightning_moe.quantization.linears import quantize_model
from lightning_moe.records import CalibrationStatistics, PrunePlan
from lightning_moe.surgery.cut import apply_plan
from lightning_moe.surgery.repair import plan_repair

log = logging.getLogger(__name__)
Loaders = Mapping[str, Iterable[Mapping[str, Tensor]]]


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """One row to make.

    Args:
        name: name of the row and of its folder.
        prune_ratio: share of routed-expert channels to remove; 0 keeps all.
        bits: 16, or 4 for NF4.
        method: a preset of `lightning_moe.allocation`.
        method_args: settings of the method.
        repair: refit the down projections by least squares.

    Raises:
        ValueError: the name is empty or not a plain file name, or `bits` is neither 4 nor 16.
    """

    name: str
    prune_ratio: float
    bits: Literal[4, 16] = 16
    method: str = "exact_global"
    method_args: dict[str, Any] = field(default_factory=dict)
    repair: bool = True

    def __post_init__(self) -> None:
        if not self.name or Path(self.name).name != self.name:
            raise ValueError(f"`name` of a stage must be a plain file name, got {self.name!r}.")
        if self.bits not in (4, 16):
            raise ValueError(f"`bits` of stage '{self.name}' must be 4 or 16, got {self.bits}.")

    @property
    def cut(self) -> tuple[Any, ...]:
        """What decides the cut: rows that agree on it share one model."""
        return self.method, str(sorted(self.method_args.items())), self.prune_ratio, self.repair


def compare_stages(
    source: str,
    *,
    stages: Sequence[StageSpec],
    statistics: CalibrationStatistics,
    calibration: Loaders,
    held_out: Loaders,
    out: str | Path,
) -> dict[str, Stage]:
    """Runs every stage and the dense model; rows are written as they are made.

    Args:
        source: the dense model.
        stages: what to run; rows of the same cut must follow each other to share it.
        statistics: of the dense model.
        calibration: batches for the second pass of the repair, by corpus.
        held_out: batches to evaluate on, by corpus.
        out: rows go to `<out>/stages`, models to `<out>/models`.

    Returns:
        Rows by name, the dense one under `dense`.
    """
    out = Path(out)
    from lightning_moe.assets import resolve_asset

    dense = evaluate_stage("dense", folder=resolve_asset(source), loaders=held_out, prune_ratio=0.0, seconds=0.0)
    save_stage(out, stage=dense)
    rows = {"dense": dense}
    for _, same_cut in groupby(stages, key=lambda stage: stage.cut):
        members = sorted(same_cut, key=lambda stage: -stage.bits)
        for row in _run_cut(
            source, members=members, statistics=statistics, calibration=calibration, held_out=held_out, out=out
        ):
            rows[row["name"]] = row
            log.info("%s: %.4f nats per token (dense %.4f).", row["name"], row["nll"], dense["nll"])
    return rows


def _run_cut(
    source: str,
    *,
    members: Sequence[StageSpec],
    statistics: CalibrationStatistics,
    calibration: Loaders,
    held_out: Loaders,
    out: Path,
) -> list[Stage]:
    """Rows that share one cut: 16 bit first, then the same model packed."""
    started = time.perf_counter()
    spec = members[0]
    model = load_model(source, dtype="float32")
    plan = build_method(spec.method, **spec.method_args).plan(statistics, prune_ratio=spec.prune_ratio)
    plan.save(out / "plans" / f"{spec.name}.json")
    repair = plan_repair(model, plan=plan, loaders=calibration) if spec.repair and _cuts(plan) else None
    apply_plan(model, plan=plan, repair=repair)
    seconds = time.perf_counter() - started
    rows = []
    for member in members:
        if member.bits == 4:
            quantize_model(model)
        folder = out / "models" / member.name
        save_ragged(model, folder, dtype=torch.bfloat16)
        row = evaluate_stage(
            member.name, folder=folder, loaders=held_out, prune_ratio=spec.prune_ratio, seconds=seconds
        )
        row |= {"method": spec.method, "repair": repair is not None, "bits": member.bits}
        save_stage(out, stage=row)
        rows.append(row)
    return rows


def _cuts(plan: PrunePlan) -> bool:
    """Whether the plan removes anything."""
    return plan.num_kept < plan.shape.num_channels
