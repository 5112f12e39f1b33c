"""The command `report`."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_moe.evaluation.routing import RoutingTable
from lightning_moe.evaluation.summary import summarise
from lightning_moe.files import read_json, write_json
from lightning_moe.records import CalibrationStatistics, PrunePlan
from lightning_moe.reporting.checks import check_mapping, check_number, check_text
from lightning_moe.reporting.report import write_report
from lightning_moe.reporting.table import summary_table

log = logging.getLogger(__name__)

# What `calibrate` and `compare` call their files.
_STATISTICS = ("statistics.safetensors", "statistics_0.safetensors")
_MOST_ROWS = 100_000
_OF_COMPARISON, _OF_MATRIX = ("name", "method"), ("method", "evaluation")


def report(
    *,
    folder: str,
    control: str = "control",
    statistics: str | None = None,
    statistics_after: str | None = None,
) -> None:
    """Gather the rows of `compare`, `evaluate` and `fit` into summary.json, a table and an HTML page.

    Args:
        folder: Folder of results that the other commands wrote into; `stages/`, `plans/`, `compare.json`, `matrix.json`
            and `router.json` are read where they are there.
        control: Name of the row that is the unpruned model given the same recovery.
        statistics: Statistics file, for the figures; null: the one in the folder, if there is one.
        statistics_after: Statistics of the cut model on the same text, to compare routers and activations.
    """
    results = Path(folder)
    rows = read_rows(results / "compare.json", what="comparison", needed=_OF_COMPARISON)
    matrix = read_rows(results / "matrix.json", what="matrix", needed=_OF_MATRIX)
    summary = None
    if (rows is None and matrix is None) or (results / "stages").is_dir():
        summary = summarise(folder, control=control)
        write_json(results / "summary.json", summary)
        log.info("%s\n\nSummary: %s", summary_table(summary), results / "summary.json")
    found = next((results / name for name in _STATISTICS if (results / name).is_file()), None)
    page = write_report(
        results / "report",
        title="Compression report",
        summary=_without(summary, rows=rows or []),
        rows=rows,
        matrix=matrix,
        plans=_plans(results, rows=[*(rows or []), *((summary or {}).get("stages") or [])]),
        statistics=_load(statistics or found),
        statistics_after=_load(statistics_after),
        routing=_routing(results),
    )
    log.info("Report: %s", page)


def read_rows(file: Path, *, what: str, needed: Sequence[str]) -> list[Mapping[str, Any]] | None:
    """The rows of a file, which all have the texts that are needed; None where there is no file.

    Raises:
        ValueError: it holds something else.
    """
    if not file.is_file():
        return None
    rows = read_json(file, what=what)
    if not isinstance(rows, list):
        raise ValueError(f"'{file}' must be a list of rows, got {type(rows).__name__}. Run `compare` again.")
    if not 0 < len(rows) <= _MOST_ROWS:
        raise ValueError(f"'{file}' must have 1 to {_MOST_ROWS} rows, got {len(rows)}. Run `compare` again.")
    for index, row in enumerate(rows):
        where = f"Row {index} of '{file}'"
        for key in needed:
            check_text(check_mapping(row, where=where), key=key, where=where)
    return rows


def _load(file: str | Path | None) -> CalibrationStatistics | None:
    return None if file is None else CalibrationStatistics.load(file)


def _without(summary: dict[str, Any] | None, *, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The summary without the rows that the comparison shows; None where nothing is left but the dense model."""
    if summary is None or not rows:
        return summary
    compared = {row["name"] for row in rows}
    left = [stage for stage in summary["stages"] if stage["name"] not in compared]
    return summary | {"stages": left} if left or summary["control"] else None


def _plans(folder: Path, *, rows: Sequence[Mapping[str, Any]]) -> dict[str, PrunePlan]:
    """Plans by name; first those of the best row at each ratio, then the others by name."""
    plans = {file.stem: PrunePlan.load(file) for file in sorted(folder.glob("plans/*.json"))}
    best: dict[float, str] = {}
    measured = [row for row in rows if row["name"] in plans]
    for row in sorted(measured, key=lambda row: check_number(row, key="nll", where=repr(row["name"]))):
        best.setdefault(plans[row["name"]].prune_ratio, row["name"])
    first = [best[ratio] for ratio in sorted(best) if ratio > 0]
    return {name: plans[name] for name in dict.fromkeys([*first, *plans])}


def _routing(folder: Path) -> dict[str, dict[str, list[float]]] | None:
    """Entropies before and after training, as RouterMonitor wrote them into the folder or one below it."""
    file = next(iter([*folder.glob("router.json"), *sorted(folder.glob("*/router.json"))]), None)
    if file is None:
        return None
    content = read_json(file, what="record of the routers")
    tables = {
        when: RoutingTable.from_dict(check_mapping(content, where=f"'{file}'").get(when), where=f"'{when}' of '{file}'")
        for when in ("before", "after")
    }
    return {f"{when} (step {table.step})": table.entropies() for when, table in tables.items()}
