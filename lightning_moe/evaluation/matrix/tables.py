"""A matrix as files, tables and figures."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from lightning_moe.evaluation.compare.rows import Row
from lightning_moe.files import write_atomically, write_json
from lightning_moe.reporting.figures.matrix import loss_matrix
from lightning_moe.reporting.figures.style import png_bytes
from lightning_moe.reporting.table import Column, format_table, one_line


def write_matrix(folder: Path, rows: Sequence[Row]) -> None:
    """`matrix.json`, a list; `matrix.csv`, the same; `matrix_<method>.png`, a figure per method of all calibrations."""
    write_json(folder / "matrix.json", list(rows))
    text = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, fieldnames=names)
    writer.writeheader()
    writer.writerows([row | {"settings": json.dumps(row["settings"], sort_keys=True)} for row in rows])
    with write_atomically(folder / "matrix.csv") as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")
    for method in dict.fromkeys(row["method"] for row in _methods(rows)):
        with write_atomically(folder / f"matrix_{method}.png") as temporary:
            temporary.write_bytes(png_bytes(loss_matrix(rows, method=method)))


def _methods(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["calibration"] is not None and not row["variant"]]


def mean_losses(rows: Sequence[Row]) -> list[Row]:
    """A row per cut: its loss above dense on each held-out corpus, in nats per token, their mean and the worst.

    `others` is the mean over held-out corpora whose name is not that of the calibration.
    """
    cuts: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        if row["calibration"] is not None:
            cuts.setdefault((row["method"], row["calibration"], row["size"]), []).append(row)
    return [_mean(members) for members in cuts.values()]


def _mean(members: list[Row]) -> Row:
    losses = {row["evaluation"]: row["loss_above_dense"] for row in members}
    others = [loss for corpus, loss in losses.items() if corpus != members[0]["calibration"]]
    own = {name: members[0][name] for name in ("method", "calibration", "size", "tokens", "variant")}
    summary = {"mean": fmean(losses.values()), "worst": max(losses.values()), "losses": losses}
    return own | summary | {"others": fmean(others) if others else None}


def matrix_tables(rows: Sequence[Row]) -> str:
    """Losses above dense in nats per token: a line per calibration at the largest size, then means by size."""
    cuts = mean_losses(rows)
    largest = max(cut["size"] for cut in cuts)
    methods = [cut for cut in cuts if not cut["variant"]]
    text = f"calibrated on {largest} tokens (`all`: of all corpora in sum, `all_each`: of each corpus)"
    parts = [
        f"Nats per token above dense, {text}",
        _by_corpus([cut for cut in methods if cut["size"] == largest]),
        "Mean over held-out corpora, by tokens of the calibration",
        _by_size(methods),
    ]
    variants = [cut for cut in cuts if cut["variant"]]
    if variants:
        parts += ["Settings, mean over held-out corpora, by tokens of each calibration corpus", _by_size(variants)]
    return "\n\n".join(parts)


_METHOD = Column(key="method", header="method", left=True)
_CALIBRATION = Column(key="calibration", header="calibrated on", left=True)


def _by_corpus(cuts: Sequence[Row]) -> str:
    corpora = list(cuts[0]["losses"])
    # Numbered keys: a corpus may be called "mean".
    numbered = list(enumerate(corpora))
    columns = [Column(key=str(index), header=one_line(name), text="{:.3f}".format) for index, name in numbered]
    columns += [Column(key=name, header=name, text="{:.4f}".format) for name in ("mean", "others", "worst")]
    table = [cut | {str(index): cut["losses"][name] for index, name in numbered} for cut in cuts]
    return format_table(table, columns=[_METHOD, _CALIBRATION, *columns])


def _by_size(cuts: Sequence[Row]) -> str:
    sizes = sorted({cut["size"] for cut in cuts})
    table: dict[tuple[str, str], Row] = {}
    for cut in cuts:
        line = table.setdefault((cut["method"], cut["calibration"]), dict(cut))
        line[str(cut["size"])] = cut["mean"]
    columns = [Column(key=str(size), header=f"{size}", text="{:.4f}".format) for size in sizes]
    return format_table(list(table.values()), columns=[_METHOD, _CALIBRATION, *columns])
