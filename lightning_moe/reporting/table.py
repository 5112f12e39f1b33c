"""Tables as text, for terminals and for Markdown."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lightning_moe.reporting.summary import Summary

ABSENT = "-"
_MARKDOWN = str.maketrans({"<": "&lt;", ">": "&gt;", "`": "'"} | {mark: f"\\{mark}" for mark in "\\|[]"})
_BYTES_PER_MB = 1e6


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of a table.

    Args:
        key: Of a row's value; a row without it, or with None, shows a dash.
        header: With the unit.
        text: Makes text of a value.
        left: Aligns left, as words want it; numbers stand on the right.
    """

    key: str
    header: str
    text: Callable[[Any], str] = str
    left: bool = False

    def cell(self, row: Mapping[str, Any]) -> str:
        """The row's value as one line of printable text."""
        value = row.get(self.key)
        return ABSENT if value is None else one_line(self.text(value))


def one_line(text: str) -> str:
    """The text without line breaks and control characters, which a terminal would act on."""
    return "".join(character if character.isprintable() else " " for character in text).strip()


def escape_markdown(text: str) -> str:
    """One line that Markdown shows as it is: no HTML, links, code or table cells of its own."""
    return one_line(text).translate(_MARKDOWN)


def _cells(rows: Sequence[Mapping[str, Any]], *, columns: Sequence[Column]) -> list[list[str]]:
    if not columns:
        raise ValueError("A table needs at least one column, got none.")
    return [
        [one_line(column.header) for column in columns],
        *([column.cell(row) for column in columns] for row in rows),
    ]


def _align(cells: list[list[str]], *, columns: Sequence[Column]) -> list[list[str]]:
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    return [
        [
            text.ljust(width) if column.left else text.rjust(width)
            for text, width, column in zip(line, widths, columns, strict=True)
        ]
        for line in cells
    ]


def format_table(rows: Sequence[Mapping[str, Any]], *, columns: Sequence[Column]) -> str:
    """Aligned text for a terminal: headers, a rule, one line per row.

    Raises:
        ValueError: no column.
    """
    lines = _align(_cells(rows, columns=columns), columns=columns)
    rule = ["-" * len(text) for text in lines[0]]
    return "\n".join("  ".join(line).rstrip() for line in [lines[0], rule, *lines[1:]])


def format_markdown(rows: Sequence[Mapping[str, Any]], *, columns: Sequence[Column]) -> str:
    """The same as a Markdown table; what Markdown would act on inside cells is escaped.

    Raises:
        ValueError: no column.
    """
    cells = [[escape_markdown(text) for text in line] for line in _cells(rows, columns=columns)]
    lines = _align(cells, columns=columns)
    rule = [
        "-" * len(text) if column.left else "-" * (len(text) - 1) + ":"
        for text, column in zip(lines[0], columns, strict=True)
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])


def megabytes(num_bytes: float) -> str:
    """Million bytes, two decimals.

    Examples:
        >>> megabytes(11_140_000)
        '11.14'
    """
    return f"{num_bytes / _BYTES_PER_MB:.2f}"


RESULT_COLUMNS = (
    Column(key="name", header="name", left=True),
    Column(key="prune_ratio", header="prune ratio", text="{:.2f}".format),
    Column(key="keep_ratio", header="keep ratio", text="{:.2f}".format),
    Column(key="nll", header="NLL (nats/token)", text="{:.4f}".format),
    Column(key="loss", header="loss above dense", text="{:+.4f}".format),
    Column(key="bytes", header="MB", text=megabytes),
    Column(key="smaller", header="x smaller", text="{:.2f}".format),
    Column(key="stored_params", header="stored params", text="{:,}".format),
    Column(key="active_params", header="active params", text="{:,}".format),
    Column(key="seconds", header="seconds", text="{:.1f}".format),
)
EXPORT_COLUMNS = (
    Column(key="path", header="export", left=True),
    Column(key="format", header="format", left=True),
    Column(key="bytes", header="MB", text=megabytes),
    Column(key="smaller", header="x smaller", text="{:.2f}".format),
    Column(key="max_logit_diff", header="max logit diff", text="{:.3g}".format),
    Column(key="median_logit_diff", header="median", text="{:.3g}".format),
    Column(key="rerouted", header="rerouted", text="{:.1%}".format),
)


def result_rows(summary: Summary) -> list[dict[str, Any]]:
    """One row per result for `RESULT_COLUMNS`: dense, stages, control. The dense row has no loss above itself."""
    return [
        asdict(result)
        | {
            "keep_ratio": 1 - result.prune_ratio,
            "loss": None if result is summary.dense else summary.loss(result),
            "smaller": summary.smaller(result.bytes),
        }
        for result in summary.results
    ]


def export_rows(summary: Summary) -> list[dict[str, Any]]:
    """One row per export for `EXPORT_COLUMNS`."""
    return [asdict(export) | {"smaller": summary.smaller(export.bytes)} for export in summary.exports]


def corpus_rows(summary: Summary) -> tuple[list[dict[str, Any]], tuple[Column, ...]]:
    """NLL in nats per token, a row per result and a column per corpus (none where no result has corpora)."""
    corpora = dict.fromkeys(corpus for result in summary.results for corpus in result.nll_per_corpus)
    # Numbered keys: a corpus may be called "name".
    columns = [
        Column(key=str(index), header=one_line(name), text="{:.4f}".format) for index, name in enumerate(corpora)
    ]
    rows = [
        {"name": result.name} | {str(index): result.nll_per_corpus.get(name) for index, name in enumerate(corpora)}
        for result in summary.results
    ]
    return rows, (Column(key="name", header="name", left=True), *columns) if columns else ()


def summary_table(summary: Mapping[str, Any], *, markdown: bool = False) -> str:
    """The results of a run as text: one table of models and, where there are exports, one of exports.

    MB are 10^6 bytes on disk, "x smaller" is dense bytes divided by the row's bytes, losses are nats per token.

    Args:
        summary: The dictionary of `summary.json` (see `Summary.from_dict`).
        markdown: Markdown instead of aligned text.

    Raises:
        ValueError: the summary misses something; the message names the place.
    """
    checked = Summary.from_dict(summary)
    form = format_markdown if markdown else format_table
    tables = [form(result_rows(checked), columns=RESULT_COLUMNS)]
    if checked.exports:
        tables.append(form(export_rows(checked), columns=EXPORT_COLUMNS))
    return "\n\n".join(tables)
