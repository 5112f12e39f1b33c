"""Rows as files and as one table: mean and spread over samples."""

import csv
import io
import json
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from lightning_moe.evaluation.compare.rows import Row
from lightning_moe.files import write_atomically, write_json
from lightning_moe.reporting.table import Column, format_table

# What rows of different samples share.
_GROUP = ("method", "ratio", "bits", "repair", "calibrations", "novices", "export", "recovered")
_MEANS = ("nll", "kl", "top1_agreement", "accuracy", "stored_params", "active_params", "bytes", "seconds")


def write_comparison(folder: Path, rows: Sequence[Row], *, baseline: str | None = None) -> str:
    """`compare.json`, the list of rows; `compare.csv`, the same with nested values as `nll_per_corpus.code`.

    Returns:
        The table, which is also in `compare.txt`.
    """
    write_json(folder / "compare.json", list(rows))
    flat = [dict(_flat(row)) for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=names)
    writer.writeheader()
    writer.writerows(flat)
    table = comparison_table(rows, baseline=baseline)
    for name, content in {"compare.csv": text.getvalue(), "compare.txt": f"{table}\n"}.items():
        with write_atomically(folder / name) as temporary:
            temporary.write_text(content, encoding="utf-8")
    return table


def _flat(row: Mapping[str, Any], *, prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for name, value in row.items():
        nested = isinstance(value, dict)
        pairs += _flat(value, prefix=f"{prefix}{name}.") if nested else [(prefix + name, value)]
    return pairs


def mean_rows(rows: Sequence[Row], *, baseline: str | None = None) -> list[Row]:
    """Rows of one method, its settings, ratio, width and repair as one: means over samples, the spread of the loss.

    Args:
        rows: with the dense one among them.
        baseline: a method; rows are also compared with its row without repair of the same ratio, bits and sample.

    Returns:
        Per group `loss` (nats per token above the dense row, mean), `spread` (standard deviation over samples; None of
        one), `num_samples`, and means of the other numbers; `accuracy` is the mean over tasks. `difference` and
        `difference_spread` are those of the loss minus the baseline's, where it has all samples, once each. `variant`,
        the name of the first row, is there where a method has several settings.
    """
    dense = next(row for row in rows if row["name"] == "dense")
    plain = [row for row in rows if row["method"] == baseline and _is_plain(row)]
    cells = [_cell(row) for row in plain]
    compared_with = {_cell(row): row["nll"] for row in plain if cells.count(_cell(row)) == 1}
    means: list[Row] = []
    for alike in _grouped(map(_with_accuracy, rows), key=lambda row: tuple(row.get(name) for name in _GROUP)):
        groups = [group for own in _grouped(alike, key=_settings) for group in _by_sample(own)]
        for members in groups:
            variant = {"variant": members[0]["name"]} if len(groups) > 1 else {}
            means.append(_mean(members, dense=dense, compared_with=compared_with) | variant)
    return means


def _grouped(rows: Iterable[Row], *, key: Callable[[Row], Hashable]) -> list[list[Row]]:
    groups: dict[Hashable, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.values())


def _settings(row: Row) -> str:
    """Of the method; a seed is another one for each sample."""
    return json.dumps({key: value for key, value in row.get("settings", {}).items() if key != "seed"}, sort_keys=True)


def _by_sample(rows: list[Row]) -> list[list[Row]]:
    """Rows of different samples together; where a sample comes twice, each alone."""
    return [rows] if len({row["sample"] for row in rows}) == len(rows) else [[row] for row in rows]


def _cell(row: Row) -> tuple[Any, ...]:
    return row["ratio"], row["bits"], row["sample"]


def _is_plain(row: Row) -> bool:
    """Neither repaired, recovered, cut twice, nor exported."""
    extras = ("repair", "recovered", "novices", "export")
    return not any(row.get(name) for name in extras) and row.get("calibrations", 1) == 1


def _mean(members: list[Row], *, dense: Row, compared_with: Mapping[tuple[Any, ...], float]) -> Row:
    known = [name for name in _MEANS if all(row.get(name) is not None for row in members)]
    mean = {name: members[0].get(name) for name in _GROUP}
    mean |= {name: fmean(row[name] for row in members) for name in known}
    losses = [row["nll"] - dense["nll"] for row in members]
    mean |= {"loss": fmean(losses), "spread": _spread(losses), "num_samples": len(members)}
    if all(_cell(row) in compared_with for row in members):
        differences = [row["nll"] - compared_with[_cell(row)] for row in members]
        mean |= {"difference": fmean(differences), "difference_spread": _spread(differences)}
    return mean


def _spread(values: Sequence[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None


def _with_accuracy(row: Row) -> Row:
    tasks = row.get("tasks")
    return row | {"accuracy": fmean(task["acc"] for task in tasks.values())} if tasks else row


def _repair(value: object) -> str:
    return {False: "-", True: "yes"}.get(value, str(value)) if isinstance(value, bool) else str(value)


_COLUMNS = (
    Column(key="method", header="method", left=True),
    Column(key="ratio", header="cut %", text=lambda value: f"{100 * value:.4g}"),
    Column(key="bits", header="bits"),
    Column(key="repair", header="repair", text=_repair, left=True),
    Column(key="extra", header="also", left=True),
    Column(key="num_samples", header="samples"),
    Column(key="nll", header="nats/token", text="{:.4f}".format),
    Column(key="loss", header="above dense", text="{:+.4f}".format),
    Column(key="spread", header="+-", text="{:.4f}".format),
    Column(key="difference", header="to baseline", text="{:+.4f}".format),
    Column(key="difference_spread", header="+-", text="{:.4f}".format),
    Column(key="kl", header="KL", text="{:.4f}".format),
    Column(key="top1_agreement", header="top-1 %", text=lambda value: f"{100 * value:.1f}"),
    Column(key="accuracy", header="tasks %", text=lambda value: f"{100 * value:.1f}"),
    Column(key="stored_params", header="stored M", text=lambda value: f"{value / 1e6:.3f}"),
    Column(key="active_params", header="active M", text=lambda value: f"{value / 1e6:.3f}"),
    Column(key="bytes", header="MB", text=lambda value: f"{value / 1e6:.2f}"),
    Column(key="seconds", header="s", text="{:.1f}".format),
)


def comparison_table(rows: Sequence[Row], *, baseline: str | None = None) -> str:
    """The table of `mean_rows`, by ratio, bits and loss; columns that no row has are left out."""
    means: list[Row] = [row | {"extra": _extra(row)} for row in mean_rows(rows, baseline=baseline)]
    means.sort(key=lambda row: (row["ratio"], -row["bits"], row["loss"]))
    shown = [column for column in _COLUMNS if any(row.get(column.key) is not None for row in means)]
    return format_table(means, columns=shown)


def _extra(row: Row) -> str | None:
    """What else was done to a row."""
    parts = (
        [str(row.get("variant"))] * ("variant" in row)
        + [row["export"]] * bool(row.get("export"))
        + ["recovered"] * bool(row.get("recovered"))
        + ["novices"] * bool(row.get("novices"))
    )
    parts += [f"{row['calibrations']} calibrations"] * ((row.get("calibrations") or 1) > 1)
    return ", ".join(parts) or None
