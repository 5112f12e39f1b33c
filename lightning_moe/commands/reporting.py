"""The command `report`."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_moe.evaluation.routing import RoutingTable
from lightning_moe.evaluation.summary import summarise
from lightning_moe.files import read_json, write_json
from lightning_moe.records import CalibrationStatistics, PrunePlan
from lightning_moe.reporting.report import write_report
from lightning_moe.reporting.table import summary_table

log = logging.getLogger(__name__)

# What `calibrate` and `compare` call their files.
_STATISTICS = ("statistics.safetensors", "statistics_0.safetensors")


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
    rows = _read(results / "compare.json", what="comparison")
    matrix = _read(results / "matrix.json", what="matrix")
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


def _read(file: Path, *, what: str) -> Any:
    return read_json(file, what=what) if file.is_file() else None


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
    for row in sorted((row for row in rows if row["name"] in plans), key=lambda row: row["nll"]):
        best.setdefault(plans[row["name"]].prune_ratio, row["name"])
    first = [best[ratio] for ratio in sorted(best) if ratio > 0]
    return {name: plans[name] for name in dict.fromkeys([*first, *plans])}


def _routing(folder: Path) -> dict[str, dict[str, list[float]]] | None:
    """Entropies before and after training, as RouterMonitor wrote them into the folder or one below it."""
    file = next(iter([*folder.glob("router.json"), *sorted(folder.glob("*/router.json"))]), None)
    if file is None:
        return None
    content = read_json(file, what="record of the routers")
    tables = {when: RoutingTable.from_dict(content[when]) for when in ("before", "after")}
    return {f"{when} (step {table.step})": table.entropies() for when, table in tables.items()}
