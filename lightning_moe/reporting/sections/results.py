"""What single rows measured: bars, size, tables."""

from collections.abc import Iterator, Mapping

from lightning_moe.reporting import figures
from lightning_moe.reporting.page import Block, Picture, heading, html_table, paragraph
from lightning_moe.reporting.summary import CONTROL, Summary
from lightning_moe.reporting.table import (
    EXPORT_COLUMNS,
    RESULT_COLUMNS,
    Column,
    corpus_rows,
    export_rows,
    result_rows,
)

_CONTROL_TEXT = (
    "The control is the unpruned model in NF4 with the same recovery: same text, same steps, same adapters. Recovery "
    "teaches a model that lost nothing, too, so the fair price of pruning is the distance to the control, not to the "
    "dense model."
)


def result_block(summary: Summary) -> Block:
    """Bars of the loss, quality against size, the tables."""
    pictures = []
    if summary.others:
        caption = (
            "Each bar is the loss above the dense model on held-out text: shorter is better, and what a bar is longer "
            "than the control's is the price of pruning."
        )
        pictures.append(Picture.of("losses", figure=figures.stage_losses(summary), caption=caption))
    if any(result.bytes for result in summary.others):
        caption = (
            "Each mark is one model: further left is smaller on disk, further down is closer to the dense model "
            "(dotted line)."
        )
        pictures.append(Picture.of("quality", figure=figures.quality_against_bytes(summary), caption=caption))
    parts = [*_tables(summary), *(picture.html() for picture in pictures)]
    return Block(title="Results", parts=parts, pictures=pictures)


def _tables(summary: Summary) -> Iterator[str]:
    yield html_table(result_rows(summary), columns=RESULT_COLUMNS)
    yield paragraph("MB are million bytes on disk, adapters included; losses are nats per token on held-out text.")
    if any(result.group == CONTROL for result in summary.others):
        yield paragraph(_CONTROL_TEXT)
    rows, columns = corpus_rows(summary)
    if columns:
        yield heading("NLL per corpus (nats per token)") + html_table(rows, columns=columns)
    if summary.exports:
        yield heading("Exports") + html_table(export_rows(summary), columns=EXPORT_COLUMNS)


def version_block(versions: Mapping[str, str]) -> Block:
    """Packages and their versions."""
    rows = [{"package": package, "version": version} for package, version in versions.items()]
    columns = [Column(key=key, header=key, left=True) for key in ("package", "version")]
    return Block(title="Versions", parts=[html_table(rows, columns=columns)])
