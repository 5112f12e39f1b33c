"""From the dense model and a plan to one measured row: cut a copy, save it, reload it, evaluate it."""

import copy
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lightning_moe.allocation.methods import PruningMethod
from lightning_moe.calibration.gram import LayerGram
from lightning_moe.evaluation.agreement import DenseReference
from lightning_moe.evaluation.compare.digests import Loaders, text_digest
from lightning_moe.evaluation.compare.rows import Repair, Row
from lightning_moe.evaluation.stages import Stage, evaluate_stage
from lightning_moe.export.huggingface import save_ragged
from lightning_moe.models.loading import DtypeName
from lightning_moe.quantization.linears import quantize_model
from lightning_moe.records import CalibrationStatistics, PrunePlan
from lightning_moe.surgery.cut import apply_plan
from lightning_moe.surgery.novices import Novices
from lightning_moe.surgery.repair import has_rows_to_fit, plan_repair
from lightning_moe.surgery.stages import cut_in_stages


@dataclass(frozen=True, kw_only=True, eq=False)
class Measures:
    """How every row of a comparison is measured.

    Args:
        held_out: batches to evaluate on, by corpus.
        dtype: type of the unpacked weights during evaluation.
        device: where.
        reference: the dense model on the same text (`DenseReference.measure`), for KL and top-1 agreement with it.
        tasks: scores of a model on zero-shot tasks, by task; None: none are taken.
        task_settings: what decides those scores, in plain types.
    """

    held_out: Loaders
    dtype: DtypeName = "float32"
    device: torch.device | str = "cpu"
    reference: DenseReference | None = None
    tasks: Callable[[PreTrainedModel], Mapping[str, Any]] | None = None
    task_settings: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Everything that decides what is measured, in plain types."""
        return {
            "held_out": text_digest(self.held_out),
            "dtype": self.dtype,
            "device": torch.device(self.device).type,
            "tasks": dict(self.task_settings),
        }

    def of_folder(
        self, name: str, *, folder: str | Path, prune_ratio: float, seconds: float, adapter: str | Path | None = None
    ) -> Stage:
        """The row of a model on disk (`evaluate_stage`)."""
        return evaluate_stage(
            name,
            folder=folder,
            loaders=self.held_out,
            prune_ratio=prune_ratio,
            seconds=seconds,
            adapter=adapter,
            dtype=self.dtype,
            device=self.device,
            reference=self.reference,
            tasks=self.tasks,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class CutModel:
    """A cut copy of the dense model: 16 bit until `measure` packs it, once, for its 4-bit rows.

    Args:
        model: the copy.
        plan: that cut it.
        repaired: how it was repaired; False where nothing was cut.
        seconds: what plan, cut and repair took.
    """

    model: PreTrainedModel = field(repr=False)
    plan: PrunePlan
    repaired: Repair
    seconds: float

    def measure(self, name: str, *, bits: int, folder: Path, measures: Measures, keep: bool, last: bool = True) -> Row:
        """Saves the model in bfloat16 or NF4, reloads it, evaluates it; ask for 16 bit first.

        Args:
            name: of the row.
            bits: 16 or 4; 4 packs the model for good.
            folder: where the model is saved.
            measures: what is measured.
            keep: leave the folder there; else it is removed.
            last: the model in memory is given up once it is saved.
        """
        started = time.perf_counter()
        if bits == 4:
            quantize_model(self.model)
        seconds = self.seconds + time.perf_counter() - started
        try:
            save_ragged(self.model, folder, dtype=torch.bfloat16)
            if last:
                vars(self).pop("model")  # or it would lie beside the one that is read from disk
            row = measures.of_folder(name, folder=folder, prune_ratio=self.plan.prune_ratio, seconds=seconds)
        finally:
            if not keep:
                shutil.rmtree(folder, ignore_errors=True)
        return row | {"repair": self.repaired, "bits": bits}


def cut_copy(
    dense: PreTrainedModel,
    *,
    plan: PrunePlan,
    repair: Repair = False,
    calibration: Loaders | None = None,
    grams: Iterable[LayerGram] | None = None,
    novices: Novices | None = None,
) -> CutModel:
    """A copy of the dense model, cut by the plan and, if wanted, repaired on the calibration text.

    Args:
        dense: stays as it is.
        plan: which channels stay.
        repair: refit the down projections (`after_nf4`: against the packed rows).
        calibration: batches by corpus; only a repair reads them.
        grams: Gram matrices of that text, if several cuts share them; not for `after_nf4`.
        novices: what experts that go leave behind.

    Raises:
        ValueError: the plan was made for another model, or a repair is wanted without text.
    """
    started = time.perf_counter()
    after_nf4 = repair == "after_nf4"
    wanted = repair if has_rows_to_fit(plan, after_nf4=after_nf4) else False
    if wanted and not calibration:
        raise ValueError(f"`repair: {repair}` needs `calibration` text, got none.")
    refit = None
    if wanted:
        refit = plan_repair(dense, plan=plan, loaders=calibration or {}, after_nf4=after_nf4, grams=grams)
    model = copy.deepcopy(dense)
    apply_plan(model, plan=plan, repair=refit, novices=novices)
    seconds = time.perf_counter() - started
    return CutModel(model=model, plan=plan, repaired=wanted, seconds=seconds)


def staged_copy(
    dense: PreTrainedModel,
    *,
    method: PruningMethod,
    prune_ratio: float,
    statistics: CalibrationStatistics,
    calibration: Loaders,
    stages: int,
    repair: Repair,
) -> CutModel:
    """A copy that is cut in several stages, with a calibration of what is left before each next one (`cut_in_stages`).

    Raises:
        ValueError: see `cut_in_stages`.
    """
    started = time.perf_counter()
    model = copy.deepcopy(dense)
    done = cut_in_stages(
        model,
        method=method,
        prune_ratio=prune_ratio,
        statistics=statistics,
        loaders=calibration,
        stages=stages,
        repair=repair,
    )
    *first, last = done.stages
    fitted = any(map(has_rows_to_fit, first)) or has_rows_to_fit(last, after_nf4=repair == "after_nf4")
    seconds = time.perf_counter() - started
    return CutModel(model=model, plan=done.plan, repaired=repair if fitted else False, seconds=seconds)


def make_row(
    dense: PreTrainedModel,
    *,
    name: str,
    plan: PrunePlan,
    measures: Measures,
    folder: str | Path,
    bits: int = 16,
    repair: Repair = False,
    calibration: Loaders | None = None,
    keep: bool = False,
) -> Row:
    """One row from a model, a plan and text; the model stays as it is.

        row = make_row(dense, name="code", plan=plan, measures=Measures(held_out=loaders), folder="runs/x/model")

    Args:
        dense: the dense model, in memory.
        name: of the row.
        plan: which channels stay.
        measures: held-out text and whatever else is measured.
        folder: where the cut model is saved and reloaded from.
        bits: 16, or 4 for NF4.
        repair: refit the down projections; needs `calibration`.
        calibration: batches by corpus.
        keep: leave the cut model in `folder`.

    Returns:
        `name`, `nll` (nats per token), `nll_per_corpus`, `stored_params`, `active_params`, `bytes`, `seconds`,
        `prune_ratio`, `repair`, `bits` and what else `measures` asks for.

    Raises:
        ValueError: see `cut_copy`, `quantize_model` and `evaluate_stage`.
    """
    cut = cut_copy(dense, plan=plan, repair=repair, calibration=calibration)
    return cut.measure(name, bits=bits, folder=Path(folder), measures=measures, keep=keep)
