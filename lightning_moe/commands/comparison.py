"""The command `compare`."""

import logging
from collections.abc import Sequence

from lightning_moe.commands._matrix import run_matrix
from lightning_moe.commands._recovering import RecoveryRun, ShortRecovery
from lightning_moe.commands._shared import Device, held_out, resolve_device, results_folder
from lightning_moe.commands._tasks import TaskRequest
from lightning_moe.evaluation.compare import (
    CONTROL,
    DENSE,
    Comparison,
    Grid,
    Measures,
    Row,
    StageSpec,
    check_names,
    needs_gradients,
)
from lightning_moe.evaluation.compare.tables import write_comparison
from lightning_moe.evaluation.matrix import Matrix
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
    tasks: list[str] | str | None = None,
    limit: int | None = None,
    seed: int = 0,
    allow_code_execution: bool = False,
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
        matrix: Calibrate on each corpus, evaluate on each; `--matrix true`: the default one. Writes
            `matrix.json` beside the rest.
        statistics: File written by `calibrate`, for one sample; null: gathered here, once per sample.
        recovery: Train some rows for a while, and the unpruned model as their control.
        agreement: Also KL divergence from the dense model and agreement with its likeliest tokens.
        tasks: Also zero-shot tasks of lm_eval, or presets (see `evaluate`). A list, or names with commas.
        limit: Items of each task, drawn by `seed`; null: all.
        seed: Seed of the tasks' items and of few-shot examples.
        allow_code_execution: Tasks may run Python programs that the model wrote, with your rights.
        baseline: Method of the grid: the table also shows each row's loss minus that of the baseline's row without
            repair, of the same ratio, bits and sample.
        keep_models: Leave the models in `<out>/models`; null: those of `stages`.
        reuse: Take rows that were made before.
        dtype: Type of the weights while they are cut and evaluated; `auto` is the stored one.
        device: Where it runs; `auto` is the GPU if there is one.
    """
    alone = bool(matrix) and grid is None and not stages
    specs = [] if alone else _specs(grid, stages, recovery=recovery, baseline=baseline)
    given = _statistics(statistics, specs=specs)
    _check_text(data, specs=specs, train=recovery is not None and not alone)
    asked = None
    if tasks is not None:
        asked = TaskRequest(tasks=tasks, limit=limit, seed=seed, allow_code_execution=allow_code_execution)
    folder = results_folder(out)
    if matrix:
        run_matrix(matrix, model=model, out=folder, data=data, reuse=reuse, dtype=dtype, device=device)
    if alone:
        return
    measured = {} if asked is None else {"tasks": asked.scores(data.tokenizer), "task_settings": asked.decides}
    kept = specs if keep_models else (stages or []) if keep_models is None else []

    comparison = Comparison(
        source=model,
        calibration=lambda sample: data.calibration_dataloaders(sample=sample),
        measures=Measures(held_out=held_out(data), dtype=dtype, device=resolve_device(device), **measured),
        out=folder,
        statistics=given,
        agreement=agreement,
        gradients=needs_gradients(specs),
        keep={spec.name for spec in kept} | _to_train(recovery),
        reuse=reuse,
    )
    run = None if recovery is None else RecoveryRun(settings=recovery, comparison=comparison, data=data)
    _make_and_write(comparison, specs, recovery=run, baseline=baseline)


def _specs(
    grid: Grid | None, stages: list[StageSpec] | None, *, recovery: ShortRecovery | None, baseline: str | None
) -> list[StageSpec]:
    """All rows that are asked for, checked."""
    specs = [*([] if grid is None else grid.rows()), *(stages or [])]
    if not specs:
        raise ValueError("`compare` needs a `grid`, `stages` or a `matrix`, got none: name methods and ratios.")
    if recovery is not None and all(spec.name != CONTROL.name for spec in specs):
        specs.insert(0, CONTROL)
    check_names(specs)
    if baseline is not None and baseline not in {spec.columns()["method"] for spec in specs}:
        raise ValueError(f"`baseline` must be a method of the grid, got '{baseline}'.")
    if recovery is not None:
        recovery.check(specs)
    return specs


def _statistics(file: str | None, *, specs: Sequence[StageSpec]) -> CalibrationStatistics | None:
    samples = {spec.sample for spec in specs}
    if file is not None and samples - {0}:
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


def _check_text(data: TextDataModule, *, specs: Sequence[StageSpec], train: bool) -> None:
    """Refuses samples that the text is too short for, and a recovery without text."""
    for sample in sorted({spec.sample for spec in specs}):
        data.calibration_dataloaders(sample=sample)
    if train:
        data.train_dataloader()


def _to_train(recovery: ShortRecovery | None) -> set[str]:
    return set() if recovery is None else {CONTROL.name, *recovery.rows}


def _make_and_write(
    comparison: Comparison, specs: Sequence[StageSpec], *, recovery: RecoveryRun | None, baseline: str | None
) -> None:
    """All rows, their table and figure; the table of those that there are where one fails."""
    recovered: list[Row] = []
    table = ""
    try:
        with quiet("lightning_moe.surgery", "lightning_moe.calibration"):
            rows = comparison.run(specs)
            recovered.extend([] if recovery is None else recovery.rows(rows))
    finally:
        names = [DENSE.name, *(spec.name for spec in specs)]
        made = [comparison.made[name] for name in names if name in comparison.made]
        if DENSE.name in comparison.made:
            table = write_comparison(comparison.out, [*made, *recovered], baseline=baseline)
    with write_atomically(comparison.out / "pareto.png") as temporary:
        temporary.write_bytes(figures.png_bytes(figures.pareto([*made, *recovered])))
    log.info("%s\n\nRows: %s", table, comparison.out / "compare.json")
