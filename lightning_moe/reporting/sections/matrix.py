"""Which text to calibrate on: the list in `matrix.json` as heat maps, one sentence per method, and settings."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from math import prod
from statistics import fmean
from typing import Any

from lightning_moe.reporting import figures
from lightning_moe.reporting.checks import check_mapping, check_number, check_rows, check_text
from lightning_moe.reporting.page import Block, Picture, bullets, heading, html_table
from lightning_moe.reporting.table import Column

Cell = Mapping[str, Any]
# Each is a figure.
_MOST_METHODS = 4
_MOST_CELLS = 10_000
_SINGLE = ("the same", "another")
_CAPTION = (
    "Each number is the loss above dense (nats per token) of {method}, calibrated on the text of its row and evaluated "
    "on the text of its column: the lighter a cell, the nearer it is to the best calibration for that column, and a "
    "light diagonal means that a corpus is best served by itself."
)


def matrix_block(rows: Sequence[Cell]) -> Block:
    """Heat maps of every method, and the settings that were tried.

    Raises:
        ValueError: a row is broken.
    """
    listed = check_rows({"rows": rows}, key="rows", where="the matrix")
    cells = [_checked(row, index=index) for index, row in enumerate(listed)]
    pruned = [row for row in cells if row.get("calibration") is not None]
    compared = [row for row in pruned if not row.get("variant")]
    _check_complete(compared)
    methods = list(dict.fromkeys(row["method"] for row in compared))
    pictures = [
        Picture.of(
            f"matrix_{index}",
            figure=figures.loss_matrix(compared, method=method),
            caption=_CAPTION.format(method=method),
        )
        for index, method in enumerate(methods[:_MOST_METHODS])
    ]
    parts = [bullets([sentence for method in methods for sentence in _sentences(compared, method=method)])]
    parts += [picture.html() for picture in pictures]
    parts += _settings([row for row in pruned if row.get("variant")])
    return Block(title="Which text to calibrate on", parts=parts, pictures=pictures)


def _checked(content: object, *, index: int) -> Cell:
    where = f"Row {index} of the matrix"
    row = check_mapping(content, where=where)
    for key in ("method", "evaluation"):
        check_text(row, key=key, where=where)
    for key in ("size", "loss_above_dense"):
        check_number(row, key=key, where=where)
    if row.get("calibration") is not None:
        check_text(row, key="calibration", where=where)
    return row


def _check_complete(rows: Sequence[Cell]) -> None:
    """Every calibration of a method is evaluated on each corpus, at each size."""
    found = {(row["method"], row["size"], row["calibration"], row["evaluation"]) for row in rows}
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        axes = [dict.fromkeys(row[key] for row in own) for key in ("size", "calibration", "evaluation")]
        if prod(map(len, axes)) > _MOST_CELLS:
            raise ValueError(f"The matrix has more than {_MOST_CELLS} cells of `{method}`: too many for a page.")
        for place in product(*axes):
            if (method, *place) not in found:
                size, calibration, evaluation = place
                raise ValueError(
                    f"The matrix lacks the row of `{method}` calibrated on {size} tokens of {calibration!r} and "
                    f"evaluated on {evaluation!r}. Run `compare` with `matrix` again."
                )


def _sentences(rows: Sequence[Cell], *, method: str) -> Iterator[str]:
    """At the largest size: the same corpus, another one, and the calibrations on several corpora."""
    own = [row for row in rows if row["method"] == method]
    largest = max(row["size"] for row in own)
    own = [row for row in own if row["size"] == largest]
    corpora = {row["evaluation"] for row in own}
    groups: dict[str, list[float]] = {}
    for row in own:
        kind = "another" if row["calibration"] in corpora else row["calibration"]
        kind = "the same" if row["calibration"] == row["evaluation"] else kind
        groups.setdefault(kind, []).append(row["loss_above_dense"])
    if {"the same", "another"} <= groups.keys():
        rest = [f"{fmean(losses):.4f} ({kind})" for kind, losses in groups.items() if kind not in _SINGLE]
        yield (
            f"{method}, {largest} tokens: {fmean(groups['the same']):.4f} nats per token above dense where the text is "
            f"the one calibrated on, {fmean(groups['another']):.4f} on another corpus"
            + (f"; calibrated on several corpora: {', '.join(rest)}" if rest else "")
            + "."
        )


def _settings(rows: Sequence[Cell]) -> list[str]:
    """Mean over held-out corpora of each setting, a column per size."""
    sizes = sorted({row["size"] for row in rows})
    losses: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        losses.setdefault(row["method"], {}).setdefault(str(row["size"]), []).append(row["loss_above_dense"])
    table = [{"method": name} | {size: fmean(own) for size, own in by_size.items()} for name, by_size in losses.items()]
    columns = [Column(key="method", header="setting", left=True)]
    columns += [Column(key=str(size), header=f"{size} tokens", text="{:.4f}".format) for size in sizes]
    title = "Settings: mean loss above dense over held-out corpora (nats per token)"
    return [heading(title), html_table(table, columns=columns)] if table else []
