"""One self-contained page about a run: what came out, what was cut, how to read it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_moe.files import write_atomically
from lightning_moe.records import CalibrationStatistics, PrunePlan
from lightning_moe.reporting.comparison import Comparison
from lightning_moe.reporting.figures.routing import Depth
from lightning_moe.reporting.page import Block, Picture, bullets, heading, page
from lightning_moe.reporting.sections import (
    calibration_blocks,
    comparison_block,
    matrix_block,
    plan_block,
    result_block,
    version_block,
)
from lightning_moe.reporting.sections.plans import different_plans
from lightning_moe.reporting.summary import Summary
from lightning_moe.reporting.verdict import verdict
from lightning_moe.reporting.words import headlines, plan_in_short

REPORT_FILE, FIGURES_FOLDER = "report.html", "report_figures"
_MOST_IN_SHORT = 3


def write_report(
    folder: str | Path,
    *,
    title: str,
    summary: Mapping[str, Any] | None = None,
    rows: Sequence[Mapping[str, Any]] | None = None,
    matrix: Sequence[Mapping[str, Any]] | None = None,
    plans: Mapping[str, PrunePlan] | None = None,
    statistics: CalibrationStatistics | None = None,
    statistics_after: CalibrationStatistics | None = None,
    routing: Mapping[str, Depth] | None = None,
) -> Path:
    """Writes `report.html`, one page with everything inside, and its figures as PNG files in `report_figures/`.

    Both appear under their names only when they are whole; a report that is there already is replaced. Everything is
    optional, but not all of it.

    Args:
        folder: Made if it is missing; other files in it stay.
        title: Of the page.
        summary: The dictionary of `summary.json` (see `Summary.from_dict`).
        rows: The list in `compare.json` (see `Comparison.from_rows`).
        matrix: The list in `matrix.json`.
        plans: Plans by name, the most important first.
        statistics: Of the calibration that the plans were made from.
        statistics_after: Of the cut model.
        routing: Mean router entropies by corpus and layer under the names of two times, before and after training.

    Returns:
        The path of the page.

    Raises:
        ValueError: there is nothing to report, summary, rows or matrix are not complete, or a plan was made for another
            model.
    """
    plans = plans or {}
    _check(title=title, plans=plans, statistics=statistics, found=(summary, rows, matrix, plans, statistics, routing))
    checked = None if summary is None else Summary.from_dict(summary)
    blocks = [_in_short(summary=checked, rows=rows, plans=plans)]
    blocks += [comparison_block(rows)] if rows else []
    blocks += [matrix_block(matrix)] if matrix else []
    blocks += [result_block(checked)] if checked is not None else []
    blocks += [plan_block(plans, statistics=statistics)] if plans else []
    blocks += calibration_blocks(statistics, after=statistics_after, routing=routing)
    blocks += [version_block(checked.versions)] if checked is not None and checked.versions else []
    blocks = [block for block in blocks if block.parts]
    return _write(
        Path(folder), text=page(title, blocks=blocks), pictures=[own for block in blocks for own in block.pictures]
    )


def _in_short(
    *, summary: Summary | None, rows: Sequence[Mapping[str, Any]] | None, plans: Mapping[str, PrunePlan]
) -> Block:
    """What a reader wants to know first: which row to take, what it cost, what was kept."""
    said = {
        "Methods compared": verdict(Comparison.from_rows(rows)) if rows else (),
        "Results": headlines(summary, beside_comparison=bool(rows)) if summary is not None else (),
        "What was cut": [plan_in_short(plan, name=names[0]) for names, plan in different_plans(plans)[:_MOST_IN_SHORT]],
    }
    parts = [heading(title) + bullets(sentences) for title, sentences in said.items() if sentences]
    return Block(title="In short", parts=parts)


def _check(
    *,
    title: str,
    plans: Mapping[str, PrunePlan],
    statistics: CalibrationStatistics | None,
    found: Sequence[object],
) -> None:
    if not title.strip():
        raise ValueError(f"A report needs a `title`, got {title!r}.")
    if not any(found):
        raise ValueError("A report needs a summary, rows, a matrix, a plan, statistics or routing, got none of them.")
    for name, plan in plans.items():
        if statistics is None:
            continue
        try:
            plan.check_fits(statistics.shape)
        except ValueError as error:
            raise ValueError(f"Plan '{name}' does not belong to the statistics of this report. {error}") from error


def _write(folder: Path, *, text: str, pictures: Sequence[Picture]) -> Path:
    with write_atomically(folder / FIGURES_FOLDER) as temporary:
        temporary.mkdir()
        for picture in pictures:
            (temporary / f"{picture.name}.png").write_bytes(picture.png)
    with write_atomically(folder / REPORT_FILE) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace")  # half characters of a JSON file
    return folder / REPORT_FILE
