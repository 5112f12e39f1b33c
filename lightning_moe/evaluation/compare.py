"""One-shot methods side by side: each is cut, saved, reloaded from disk and evaluated."""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_moe.allocation import build_method
from lightning_moe.allocation.budget import resolve_prune_ratio
from lightning_moe.assets import resolve_asset
from lightning_moe.evaluation.stages import Stage, check_stage_name, evaluate_stage, save_stage
from lightning_moe.export.huggingface import save_ragged
from lightning_moe.models.loading import DtypeName, load_model
from lightning_moe.quantization.linears import quantize_model
from lightning_moe.records import CalibrationStatistics
from lightning_moe.surgery.cut import apply_plan
from lightning_moe.surgery.repair import plan_repair

log = logging.getLogger(__name__)
Loaders = Mapping[str, Iterable[Mapping[str, Tensor]]]


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """One row to make.

    Args:
        name: name of the row and of its folder.
        prune_ratio: share of routed-expert channels to remove; 0 keeps all. Exactly one of this and `keep_ratio`.
        keep_ratio: share that stays, in (0, 1]: 1 - `prune_ratio`.
        bits: 16, or 4 for NF4.
        method: a preset of `lightning_moe.allocation`.
        method_args: settings of the method.
        repair: refit the down projections by least squares.

    Raises:
        ValueError: the name is not a plain file name, `bits` is neither 4 nor 16, or ratio, method or settings are
            refused.
    """

    name: str
    prune_ratio: float | None = None
    keep_ratio: float | None = None
    bits: Literal[4, 16] = 16
    method: str = "exact_global"
    method_args: dict[str, Any] = field(default_factory=dict)
    repair: bool = True

    def __post_init__(self) -> None:
        check_stage_name(self.name)
        resolve_prune_ratio(prune_ratio=self.prune_ratio, keep_ratio=self.keep_ratio)
        build_method(self.method, **self.method_args)
        if self.bits not in (4, 16):
            raise ValueError(f"`bits` of stage '{self.name}' must be 4 or 16, got {self.bits}.")

    @property
    def requested_ratio(self) -> float:
        """The prune ratio, in whichever word it was given."""
        return resolve_prune_ratio(prune_ratio=self.prune_ratio, keep_ratio=self.keep_ratio)

    @property
    def cut(self) -> tuple[Any, ...]:
        """What decides the cut: rows that agree on it share one model."""
        return self.method, str(sorted(self.method_args.items())), self.requested_ratio, self.repair


def compare_stages(
    source: str,
    *,
    stages: Sequence[StageSpec],
    statistics: CalibrationStatistics,
    calibration: Loaders,
    held_out: Loaders,
    out: str | Path,
    dtype: DtypeName = "float32",
    device: torch.device | str = "cpu",
) -> dict[str, Stage]:
    """Runs every stage and the dense model; rows are written as they are made.

    Args:
        source: the dense model.
        stages: what to run; rows of the same cut must follow each other to share it.
        statistics: of the dense model.
        calibration: batches for the second pass of the repair, by corpus.
        held_out: batches to evaluate on, by corpus.
        out: rows go to `<out>/stages`, models to `<out>/models`.
        dtype: type of the weights while they are cut and evaluated.
        device: where.

    Returns:
        Rows by name, the dense one under `dense`.

    Raises:
        ValueError: two stages share a name, or something of a stage is refused.
    """
    out = Path(out)
    names = ["dense", *(stage.name for stage in stages)]
    if len(set(names)) < len(names):
        raise ValueError(f"Every stage needs its own name, and `dense` is the unpruned model's; got {names}.")
    bench = _Bench(
        source=resolve_asset(source),
        statistics=statistics,
        calibration=calibration,
        held_out=held_out,
        out=out,
        dtype=dtype,
        device=device,
    )
    dense = bench.evaluate("dense", folder=bench.source, prune_ratio=0.0, seconds=0.0)
    save_stage(out, stage=dense)
    rows = {"dense": dense}
    for _, same_cut in groupby(stages, key=lambda stage: stage.cut):
        for row in bench.run_cut(sorted(same_cut, key=lambda stage: -stage.bits)):
            rows[row["name"]] = row
            log.info("%s: %.4f nats per token (dense %.4f).", row["name"], row["nll"], dense["nll"])
    return rows


@dataclass(frozen=True, kw_only=True, eq=False)
class _Bench:
    """What every stage of one comparison shares: see `compare_stages`."""

    source: str
    statistics: CalibrationStatistics
    calibration: Loaders
    held_out: Loaders
    out: Path
    dtype: DtypeName
    device: torch.device | str

    def evaluate(self, name: str, *, folder: str | Path, prune_ratio: float, seconds: float) -> Stage:
        """The row of a folder."""
        return evaluate_stage(
            name,
            folder=folder,
            loaders=self.held_out,
            prune_ratio=prune_ratio,
            seconds=seconds,
            dtype=self.dtype,
            device=self.device,
        )

    def run_cut(self, members: Sequence[StageSpec]) -> Iterator[Stage]:
        """Rows that share one cut: 16 bit first, then the same model packed."""
        started = time.perf_counter()
        spec, packed = members[0], False
        model, repaired = self._cut(spec)
        seconds = time.perf_counter() - started
        for member in members:
            if member.bits == 4 and not packed:
                quantize_model(model)
                packed = True
            folder = self.out / "models" / member.name
            save_ragged(model, folder, dtype=torch.bfloat16)
            row = self.evaluate(member.name, folder=folder, prune_ratio=spec.requested_ratio, seconds=seconds)
            row |= {"method": spec.method, "repair": repaired, "bits": member.bits}
            save_stage(self.out, stage=row)
            yield row

    def _cut(self, spec: StageSpec) -> tuple[PreTrainedModel, bool]:
        """The cut model, and whether it was repaired."""
        model = load_model(self.source, dtype=self.dtype)
        model.to(self.device)  # pyright: ignore[reportArgumentType]: transformers wraps `to` without its types
        plan = build_method(spec.method, **spec.method_args).plan(self.statistics, prune_ratio=spec.requested_ratio)
        plan.save(self.out / "plans" / f"{spec.name}.json")
        wanted = spec.repair and plan.num_kept < plan.shape.num_channels
        repair = plan_repair(model, plan=plan, loaders=self.calibration) if wanted else None
        apply_plan(model, plan=plan, repair=repair)
        return model, repair is not None
