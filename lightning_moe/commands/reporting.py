"""The command `report`."""

import logging
from pathlib import Path

from lightning_moe.evaluation.summary import summarise
from lightning_moe.files import write_json
from lightning_moe.records import CalibrationStatistics, PrunePlan
from lightning_moe.reporting.report import write_report
from lightning_moe.reporting.table import summary_table

log = logging.getLogger(__name__)


def report(*, folder: str, control: str = "control", statistics: str | None = None) -> None:
    """Gather the rows of `compare`, `evaluate` and `fit` into summary.json, a table and an HTML page.

    Args:
        folder: Folder of results that the other commands wrote into.
        control: Name of the row that is the unpruned model given the same recovery.
        statistics: Statistics file, for the figures.
    """
    summary = summarise(folder, control=control)
    write_json(Path(folder) / "summary.json", summary)
    plans = {file.stem: PrunePlan.load(file) for file in sorted(Path(folder).glob("plans/*.json"))}
    loaded = None if statistics is None else CalibrationStatistics.load(statistics)
    page = write_report(
        Path(folder) / "report", title="Compression report", summary=summary, plans=plans, statistics=loaded
    )
    log.info("%s\n\nSummary: %s\nReport: %s", summary_table(summary), Path(folder) / "summary.json", page)
