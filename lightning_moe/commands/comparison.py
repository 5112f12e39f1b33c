"""The command `compare`."""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning_moe.commands._matrix import run_matrix
from lightning_moe.commands._recovering import CONTROL, RecoveryRun, ShortRecovery
from lightning_moe.commands._shared import Device, held_out, resolve_device
from lightning_moe.evaluation.compare import Comparison, Grid, Measures, Row, StageSpec, check_names, needs_gradients
from lightning_moe.evaluation.compare.digests import Loaders
from lightning_moe.evaluation.compare.tables import write_comparison
from lightning_moe.evaluation.matrix import Matrix
from lightning_moe.evaluation.tasks import evaluate_tasks, plan_tasks
from lightning_moe.files import write_atomically
from lightning_moe.models.loading import DtypeName
from lightning_moe.progress import quiet
from lightning_moe.records import CalibrationStatistics
from lightning_moe.reporting import figures
from lightning_moe.training.data import TextDataModule

log = logging.getLogger(__name__)


def compare(
    *,
    model: str,
    out: str,
    data: TextDataModule,
    grid: Grid | None = None,
    stages: list[StageSpec] | None = None,
    matrix: bool | Matrix = False,
    statistics: str | None = None,
    recovery: ShortRecovery | None = None,
    agreement: bool = False,
    tasks: list[str] | None = None,
    limit: int | None = None,
    baseline: str | None = None,
    keep_models: bool | None = None,
    reuse: bool = True,
    dtype: DtypeName = "float32",
    device: Device = "auto",
) -> None:
    """Methods, ratios and bits side by side: each is cut, saved, reloaded and evaluated on held-out text.

    Writes a JSON file per row, and of all `compare.json`, `compare.csv` and the figure `pareto.png`. Rows that were
    made before from the same things are taken as they are.

    Args:
        model: Folder, `asset:small_moe` or hub name of the dense model.
        out: Folder of results.
        data: The data module; `calibration` for statistics and repair, `validation` to evaluate, `train` to recover.
        grid: Rows for every combination of methods, ratios, samples, repairs and bits.
        stages: Single rows, instead or besides.
        matrix: Calibrate on each corpus, evaluate on each; true: the default one. Writes `matrix.json` beside the rest.
        statistics: File written by `calibrate`, for one sample; null: gathered here, once per sample.
        recovery: Train some rows for a while, and the unpruned model as their control.
        agreement: Also KL divergence from the dense model and agreement with its likeliest tokens.
        tasks: Also zero-shot tasks, by name or preset.
        limit: Items of each task; null: all.
        baseline: Method of the grid: the table also shows each row's loss minus that of the baseline's row without
            repair, of the same ratio, bits and sample.
        keep_models: Leave the models in `<out>/models`; null: those of `stages`.
        reuse: Take rows that were made before.
        dtype: Type of the weights while they are cut and evaluated.
        device: Where it runs; `auto` is the GPU if there is one.
    """
    if matrix:
        run_matrix(matrix, model=model, out=Path(out), data=data, reuse=reuse, dtype=dtype, device=device)
        if grid is None and not stages:
            return
    specs = _specs(grid, stages, recovery=recovery, baseline=baseline)
    given = _statistics(statistics, specs=specs)
    measured = {} if tasks is None else _task_measures(tasks, limit=limit, data=data)
    kept = specs if keep_models else (stages or []) if keep_models is None else []

    def calibration(sample: int) -> Loaders:
        return data.calibration_dataloaders(sample=None if given is not None or grid is None else sample)

    comparison = Comparison(
        source=model,
        calibration=calibration,
        measures=Measures(held_out=held_out(data), dtype=dtype, device=resolve_device(device), **measured),
        out=Path(out),
        statistics=given,
        agreement=agreement,
        gradients=needs_gradients(specs),
        keep={spec.name for spec in kept} | _to_train(recovery),
        reuse=reuse,
    )
    with quiet("lightning_moe.surgery", "lightning_moe.calibration"):
        rows = comparison.run(specs)
        if recovery is not None:
            rows += RecoveryRun(settings=recovery, comparison=comparison, data=data).rows(rows)
    _write(Path(out), rows, baseline=baseline)


def _specs(
    grid: Grid | None, stages: list[StageSpec] | None, *, recovery: ShortRecovery | None, baseline: str | None
) -> list[StageSpec]:
    """All rows that are asked for, checked."""
    specs = [*([] if grid is None else grid.rows()), *(stages or [])]
    if not specs:
        raise ValueError("`compare` needs a `grid` or `stages`, got neither: name methods and ratios.")
    check_names(specs)
    if baseline is not None and baseline not in {spec.columns()["method"] for spec in specs}:
        raise ValueError(f"`baseline` must be a method of the grid, got '{baseline}'.")
    if recovery is not None:
        recovery.check(specs)
    return specs


def _statistics(file: str | None, *, specs: Sequence[StageSpec]) -> CalibrationStatistics | None:
    samples = {spec.sample for spec in specs}
    if file is not None and samples != {0}:
        raise ValueError(
            f"`statistics` is one file, and the rows ask for {len(samples)} samples of the text. Leave `statistics` "
            "out, and they are gathered for each."
        )
    given = None if file is None else CalibrationStatistics.load(file)
    if given is not None and needs_gradients(specs) and "loss_taylor" not in given.total()[0]:
        raise ValueError(
            f"A method asks for gradients of the loss, and '{file}' has none. Run `calibrate` with `gradients` set to "
            "true, or leave `statistics` out."
        )
    return given


def _task_measures(tasks: list[str], *, limit: int | None, data: TextDataModule) -> Mapping[str, Any]:
    plan_tasks(tasks)  # refuses unknown ones before anything runs
    scores = partial(evaluate_tasks, tokenizer=data.tokenizer, tasks=tasks, limit=limit)
    return {"tasks": scores, "task_settings": {"tasks": tasks, "limit": limit}}


def _to_train(recovery: ShortRecovery | None) -> set[str]:
    return set() if recovery is None else {CONTROL, *recovery.rows}


def _write(folder: Path, rows: Sequence[Row], *, baseline: str | None) -> None:
    table = write_comparison(folder, rows, baseline=baseline)
    with write_atomically(folder / "pareto.png") as temporary:
        temporary.write_bytes(figures.png_bytes(figures.pareto(rows)))
    log.info("%s\n\nRows: %s", table, folder / "compare.json")
