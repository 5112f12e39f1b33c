"""Methods side by side: the frontier, every method at every retention, tables."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning_moe.reporting import figures
from lightning_moe.reporting.comparison import DENSE, Comparison, Variant
from lightning_moe.reporting.figures.frontier import pareto_frontier
from lightning_moe.reporting.page import Block, Picture, folded, heading, html_table, paragraph
from lightning_moe.reporting.table import Column, megabytes, one_line
from lightning_moe.reporting.verdict import duels, smaller

# A longer table is folded.
_FEW_ROWS = 16
_NOTE = (
    "Losses are nats per token on held-out text, means over calibration samples; lowest and highest are of the single "
    "samples. KL divergence and agreement of the most likely token are against the dense model. MB are million bytes "
    "on disk."
)
_COLUMNS = (
    Column(key="label", header="method", left=True),
    Column(key="prune_ratio", header="prune ratio", text="{:.2f}".format),
    Column(key="keep_ratio", header="keep ratio", text="{:.2f}".format),
    Column(key="bits", header="bits"),
    Column(key="nll", header="NLL", text="{:.4f}".format),
    Column(key="loss", header="loss above dense", text="{:+.4f}".format),
    Column(key="range", header="lowest to highest"),
    Column(key="kl", header="KL", text="{:.4f}".format),
    Column(key="agreement", header="top-1 agreement", text="{:.1%}".format),
    Column(key="bytes", header="MB", text=megabytes),
    Column(key="smaller", header="x smaller", text="{:.2f}".format),
    Column(key="stored_params", header="stored params", text="{:,.0f}".format),
    Column(key="active_params", header="active params", text="{:,.0f}".format),
    Column(key="seconds", header="seconds", text="{:.1f}".format),
    Column(key="samples", header="samples"),
)

_DUEL_COLUMNS = (
    Column(key="claim", header="claim", left=True),
    Column(key="ratio", header="prune ratio", text="{:.2f}".format),
    Column(key="repair", header="repaired"),
    Column(key="first", header="one"),
    Column(key="second", header="the other"),
    Column(key="share", header="one / the other", text="{:.2f}".format),
    Column(key="clear", header="beyond the samples' spread"),
)


def comparison_block(rows: Sequence[Mapping[str, Any]]) -> Block:
    """Figures and tables of the list in `compare.json`."""
    comparison = Comparison.from_rows(rows)
    pictures = _pictures(rows, comparison=comparison)
    everything = sorted(comparison.variants, key=lambda own: _order(comparison, variant=own))
    parts = [
        *(picture.html() for picture in pictures),
        heading("Rows that no other beats in size and loss, smallest first"),
        html_table(_table_rows(comparison, variants=frontier_variants(comparison)), columns=_COLUMNS),
        paragraph(_NOTE),
        *_duel_parts(comparison),
        folded("All rows", parts=[html_table(_table_rows(comparison, variants=everything), columns=_COLUMNS)]),
        *_corpus_parts(comparison, variants=everything),
        *_task_parts(comparison, variants=everything),
    ]
    return Block(title="Methods compared", parts=parts, pictures=pictures)


def _pictures(rows: Sequence[Mapping[str, Any]], *, comparison: Comparison) -> list[Picture]:
    caption = (
        "Each mark is one model, mean over calibration samples, its bar from the lowest to the highest: further down "
        "is closer to the dense model (star), further left is smaller (left panel) or faster (right panel), and the "
        "grey band joins the rows that no other beats in both."
    )
    pictures = [Picture.of("pareto", figure=figures.pareto(rows), caption=caption)]
    if any(variant.setting.ratio and variant.setting.method != DENSE for variant in comparison.variants):
        measured = (
            "accuracy (bars: one standard error)" if comparison.tasks else "loss (bars: lowest to highest sample)"
        )
        caption = (
            f"Each line of marks is one method, best at the top: its {measured} at each share of channels kept; marks "
            "near the dotted line are as good as the dense model."
        )
        pictures.append(Picture.of("retention", figure=figures.by_retention(rows), caption=caption))
    return pictures


def frontier_variants(comparison: Comparison) -> list[Variant]:
    """Rows that no other beats in both bytes and loss, smallest first; the dense model is one of the others."""
    points = {}
    for variant in comparison.variants:
        size, loss = variant.spread(lambda row: row.bytes), comparison.loss(variant)
        if size is not None and loss is not None:
            points.setdefault((size.mean, loss.mean), variant)
    dense = [] if comparison.dense.bytes is None else [(float(comparison.dense.bytes), 0.0)]
    return [points[point] for point in pareto_frontier([*points, *dense]) if point in points]


def _order(comparison: Comparison, *, variant: Variant) -> tuple[float, int, float]:
    loss = comparison.loss(variant)
    return variant.setting.ratio or 0.0, -variant.setting.bits, float("inf") if loss is None else loss.mean


def _label(variant: Variant) -> str:
    """The method and what was done besides: ratio and bits have columns of their own."""
    setting = variant.setting
    words = [setting.method, setting.variant, "repaired" * setting.repair, "recovered" * setting.recovered]
    return ", ".join(word for word in words if word)


def _mean(variant: Variant, key: str) -> float | None:
    """Mean of a column over samples; None where a sample has none."""
    spread = variant.spread(lambda row: vars(row)[key])
    return None if spread is None else spread.mean


def _table_rows(comparison: Comparison, *, variants: Sequence[Variant]) -> list[dict[str, Any]]:
    return [_table_row(comparison, variant=_dense(comparison)), *(_table_row(comparison, variant=v) for v in variants)]


def _dense(comparison: Comparison) -> Variant:
    return Variant(setting=comparison.dense.setting, rows=(comparison.dense,))


def _table_row(comparison: Comparison, *, variant: Variant) -> dict[str, Any]:
    loss, ratio = comparison.loss(variant), variant.setting.ratio
    ratio = _mean(variant, "prune_ratio") if ratio is None else ratio
    is_dense = variant.rows == (comparison.dense,)
    numbers = ("nll", "kl", "bytes", "stored_params", "active_params", "seconds")
    return {key: _mean(variant, key) for key in numbers} | {
        "label": _label(variant),
        "prune_ratio": ratio,
        "keep_ratio": None if ratio is None else 1 - ratio,
        "bits": variant.setting.bits,
        "loss": None if loss is None or is_dense else loss.mean,
        "range": None if loss is None or len(variant.rows) < 2 else f"{loss.low:+.4f} to {loss.high:+.4f}",
        "agreement": _mean(variant, "top1_agreement"),
        "smaller": smaller(comparison, variant=variant),
        "samples": len(variant.rows),
    }


def _duel_parts(comparison: Comparison) -> Iterator[str]:
    rows = [
        {
            "claim": duel.claim,
            "ratio": duel.ratio,
            "repair": "both" if duel.repair else "neither",
            "first": f"{duel.methods[0]} {duel.losses[0].mean:+.4f}",
            "second": f"{duel.methods[1]} {duel.losses[1].mean:+.4f}",
            "share": duel.share,
            "clear": "yes" if duel.is_clear else "no",
        }
        for duel in duels(comparison)
    ]
    if rows:
        yield heading("Claims tested: loss above dense of rows that differ in the method alone, 16 bit")
        yield html_table(rows, columns=_DUEL_COLUMNS)


def _corpus_parts(comparison: Comparison, *, variants: Sequence[Variant]) -> Iterator[str]:
    corpora = list(comparison.dense.nll_per_corpus)
    if not corpora:
        return
    # Numbered keys: a corpus may be called "label".
    columns = [_own_column()] + [
        Column(key=str(place), header=one_line(corpus), text="{:+.4f}".format) for place, corpus in enumerate(corpora)
    ]
    rows = [
        {"label": variant.setting.label}
        | {str(place): _corpus_loss(comparison, variant=variant, corpus=corpus) for place, corpus in enumerate(corpora)}
        for variant in variants
    ]
    yield folded("Loss above dense per corpus", parts=[html_table(rows, columns=columns)])


def _corpus_loss(comparison: Comparison, *, variant: Variant, corpus: str) -> float | None:
    dense = comparison.dense.nll_per_corpus[corpus]
    spread = variant.spread(lambda row: row.nll_per_corpus.get(corpus))
    return None if spread is None else spread.mean - dense


def _task_parts(comparison: Comparison, *, variants: Sequence[Variant]) -> Iterator[str]:
    if not comparison.tasks:
        return
    dense, tasks = _dense(comparison), comparison.tasks
    columns = [_own_column(), *(Column(key=str(place), header=one_line(task)) for place, task in enumerate(tasks))]
    rows = [
        {"label": variant.setting.label} | {str(place): _accuracy(variant, task) for place, task in enumerate(tasks)}
        for variant in [dense, *variants]
    ]
    yield folded(
        "Accuracy per task (± one standard error)",
        parts=[html_table(rows, columns=columns)],
        is_open=len(rows) <= _FEW_ROWS,
    )


def _own_column() -> Column:
    return Column(key="label", header="method", left=True)


def _accuracy(variant: Variant, task: str) -> str | None:
    scores = [row.tasks.get(task) for row in variant.rows]
    known = [score for score in scores if score is not None]
    if not known or len(known) < len(scores):
        return None
    mean, errors = sum(score.accuracy for score in known) / len(known), [score.stderr for score in known]
    largest = max((error for error in errors if error is not None), default=None)
    return f"{mean:.1%}" + ("" if largest is None else f" ± {100 * largest:.1f}")
