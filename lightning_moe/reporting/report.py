"""One self-contained page about a run: what came out, what was cut, how to read it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lightning_moe.criteria import CHANNEL_CRITERIA
from lightning_moe.files import write_atomically
from lightning_moe.records import CalibrationStatistics, ChannelScores, PrunePlan
from lightning_moe.reporting import figures
from lightning_moe.reporting.page import Picture, bullets, folded, heading, html_table, page, paragraph, section
from lightning_moe.reporting.summary import CONTROL, Summary
from lightning_moe.reporting.table import (
    EXPORT_COLUMNS,
    RESULT_COLUMNS,
    Column,
    corpus_rows,
    export_rows,
    result_rows,
)
from lightning_moe.reporting.words import headlines, plan_in_words

REPORT_FILE, FIGURES_FOLDER = "report.html", "report_figures"

# One unit for all layers and all methods, so that plans can be compared.
_CURVE_CRITERION = "channel_ablation"

_CAPTIONS = {
    "losses": "Each bar is the loss above the dense model on held-out text: shorter is better, and what a bar is "
    "longer than the control's is the price of pruning.",
    "quality": "Each mark is one model: further left is smaller on disk, further down is closer to the dense model "
    "(dotted line).",
    "widths": "Each cell is one expert: the brighter, the more of its channels stay; a white cross marks an expert "
    "that is gone as a whole.",
    "kept": "Each bar is one layer: layers above the dashed line were spared, layers below it paid for them.",
    "curves": "Each line is one layer: the steeper it rises, the fewer channels do the work; the dot is the share of "
    "channels that the plan keeps and the share of the score that they hold.",
    "usage": "Each mark is one expert: the further right, the more tokens were routed to it, and the higher, the more "
    "of it stays; a cross far to the right would be a busy expert that was lost.",
    "entropy": "Each line is one corpus: mass on the left means that the router is sure of one expert, mass on the "
    "right that it hardly prefers any.",
}
_CONTROL_TEXT = (
    "The control is the unpruned model in NF4 with the same recovery: same text, same steps, same adapters. Recovery "
    "teaches a model that lost nothing, too, so the fair price of pruning is the distance to the control, not to the "
    "dense model."
)


@dataclass(frozen=True, kw_only=True)
class _Block:
    """A part of the page and the pictures in it."""

    html: str
    pictures: Sequence[Picture] = ()


def _picture(name: str, *, figure: Figure, prefix: str = "") -> Picture:
    return Picture(name=prefix + name, caption=_CAPTIONS[name], png=figures.png_bytes(figure))


def _result_block(summary: Summary) -> _Block:
    pictures = []
    if summary.others:
        pictures.append(_picture("losses", figure=figures.stage_losses(summary)))
    if any(result.bytes for result in summary.others):
        pictures.append(_picture("quality", figure=figures.quality_against_bytes(summary)))
    in_short = section("In short", parts=[bullets(headlines(summary))])
    parts = [*_result_tables(summary), *(picture.html() for picture in pictures)]
    return _Block(html=in_short + section("Results", parts=parts), pictures=pictures)


def _result_tables(summary: Summary) -> Iterator[str]:
    yield html_table(result_rows(summary), columns=RESULT_COLUMNS)
    yield paragraph("MB are million bytes on disk, adapters included; losses are nats per token on held-out text.")
    if any(result.group == CONTROL for result in summary.others):
        yield paragraph(_CONTROL_TEXT)
    rows, columns = corpus_rows(summary)
    if columns:
        yield heading("NLL per corpus (nats per token)") + html_table(rows, columns=columns)
    if summary.exports:
        yield heading("Exports") + html_table(export_rows(summary), columns=EXPORT_COLUMNS)


def _plan_block(plans: Mapping[str, PrunePlan], *, statistics: CalibrationStatistics | None) -> _Block:
    scores = None if statistics is None else CHANNEL_CRITERIA[_CURVE_CRITERION](statistics)
    parts, pictures = [], []
    for index, (name, plan) in enumerate(plans.items()):
        own = _plan_pictures(plan, statistics=statistics, scores=scores, prefix=f"plan_{index}_")
        pictures += own
        parts.append(_plan_part(name, plan=plan, pictures=own, is_open=index == 0))
    return _Block(html=section("What was cut", parts=parts), pictures=pictures)


def _plan_pictures(
    plan: PrunePlan, *, statistics: CalibrationStatistics | None, scores: ChannelScores | None, prefix: str
) -> list[Picture]:
    made = {"widths": figures.width_heatmap(plan), "kept": figures.kept_share(plan)}
    if scores is not None:
        made["curves"] = figures.score_curves(scores, plan=plan)
    if statistics is not None:
        made["usage"] = figures.usage_against_width(statistics, plan=plan)
    return [_picture(name, figure=figure, prefix=prefix) for name, figure in made.items()]


def _plan_part(name: str, *, plan: PrunePlan, pictures: Sequence[Picture], is_open: bool) -> str:
    whole, *layers = plan_in_words(plan)
    parts = [paragraph(whole), bullets(layers), *(picture.html() for picture in pictures)]
    return folded(f"{name} ({plan.method}, prune ratio {plan.prune_ratio:.2f})", parts=parts, is_open=is_open)


def _calibration_block(statistics: CalibrationStatistics) -> _Block:
    tokens = {corpus: int(layers[0]["num_tokens"]) for corpus, layers in statistics.corpora.items()}
    seen = f"Calibration saw {', '.join(f'{count:,} tokens of {corpus}' for corpus, count in tokens.items())}."
    entropy = _picture("entropy", figure=figures.router_entropy(statistics))
    return _Block(html=section("Calibration", parts=[paragraph(seen), entropy.html()]), pictures=[entropy])


def _version_block(versions: Mapping[str, str]) -> _Block:
    rows = [{"package": package, "version": version} for package, version in versions.items()]
    columns = [Column(key=key, header=key, left=True) for key in ("package", "version")]
    return _Block(html=section("Versions", parts=[html_table(rows, columns=columns)] if rows else []))


def _check(
    *, title: str, plans: Mapping[str, PrunePlan], statistics: CalibrationStatistics | None, empty: bool
) -> None:
    if not title.strip():
        raise ValueError(f"A report needs a `title`, got {title!r}.")
    if empty:
        raise ValueError("A report needs a summary, a plan or statistics, got none of them.")
    for name, plan in plans.items():
        if statistics is None:
            continue
        try:
            plan.check_fits(statistics.shape)
        except ValueError as error:
            raise ValueError(f"Plan '{name}' does not belong to the statistics of this report. {error}") from error


def write_report(
    folder: str | Path,
    *,
    title: str,
    summary: Mapping[str, Any] | None,
    plans: Mapping[str, PrunePlan],
    statistics: CalibrationStatistics | None,
) -> Path:
    """Writes `report.html`, one page with everything inside, and its figures as PNG files in `report_figures/`.

    Both appear under their names only when they are whole; a report that is there already is replaced.

    Args:
        folder: Made if it is missing; other files in it stay.
        title: Of the page.
        summary: The dictionary of `summary.json` (see `Summary.from_dict`), or None.
        plans: Plans by name, the most important first; may be empty.
        statistics: Of the calibration that the plans were made from, or None.

    Returns:
        The path of the page.

    Raises:
        ValueError: there is nothing to report, the summary is not complete, or a plan was made for another model.
    """
    _check(title=title, plans=plans, statistics=statistics, empty=summary is None and not plans and statistics is None)
    checked = None if summary is None else Summary.from_dict(summary)
    blocks = [_result_block(checked)] if checked is not None else []
    blocks.append(_plan_block(plans, statistics=statistics))
    if statistics is not None:
        blocks.append(_calibration_block(statistics))
    if checked is not None:
        blocks.append(_version_block(checked.versions))
    text = page(title, parts=[block.html for block in blocks])
    return _write(Path(folder), text=text, pictures=[picture for block in blocks for picture in block.pictures])


def _write(folder: Path, *, text: str, pictures: list[Picture]) -> Path:
    with write_atomically(folder / FIGURES_FOLDER) as temporary:
        temporary.mkdir()
        for picture in pictures:
            (temporary / f"{picture.name}.png").write_bytes(picture.png)
    with write_atomically(folder / REPORT_FILE) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return folder / REPORT_FILE
