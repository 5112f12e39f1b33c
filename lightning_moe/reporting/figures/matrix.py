"""Figures of a matrix of calibrations: which text to calibrate on for which use."""

# X calibrations, Y held-out corpora

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_moe.reporting.figures.style import new_panels, plain

_CELL_WIDTH, _CELL_HEIGHT, _MARGIN = 0.62, 0.34, 1.9


def loss_matrix(rows: Sequence[Mapping[str, Any]], *, method: str) -> Figure:
    """Loss above dense of one method, calibrations down and held-out corpora across, a panel per size.

    The number is the loss in nats per token above dense, the last column the mean. The colour is how far it lies above
    the best calibration for that column, over all sizes: light is best.

    Args:
        rows: `method`, `calibration`, `size`, `evaluation`, `loss_above_dense` each.
        method: whose rows to show.

    Raises:
        ValueError: there is no row of that method.
    """
    own = [row for row in rows if row["method"] == method]
    if not own:
        known = list(dict.fromkeys(row["method"] for row in rows))
        raise ValueError(f"There is no row of method '{method}', only of {known}.")
    sizes = sorted({row["size"] for row in own})
    calibrations = list(dict.fromkeys(row["calibration"] for row in own))
    corpora = list(dict.fromkeys(row["evaluation"] for row in own))
    losses = {(row["size"], row["calibration"], row["evaluation"]): row["loss_above_dense"] for row in own}
    tables = [_with_mean([[losses[size, x, y] for y in corpora] for x in calibrations]) for size in sizes]
    best_Y = np.min([loss_XY.min(axis=0) for loss_XY in tables], axis=0)
    farthest = max(float((loss_XY - best_Y).max()) for loss_XY in tables)
    width = _MARGIN + len(sizes) * _CELL_WIDTH * (len(corpora) + 1)
    figure, panels = new_panels(
        columns=len(sizes), width=width, height=_MARGIN + _CELL_HEIGHT * len(calibrations), sharey=True
    )
    for axes, size, loss_XY in zip(panels, sizes, tables, strict=True):
        _draw(axes, loss_XY=loss_XY, above_XY=loss_XY - best_Y, farthest=farthest)
        axes.set_xticks(range(len(corpora) + 1), labels=[*map(plain, corpora), "mean"], rotation=60, ha="right")
        axes.set_title(f"{size} tokens", fontsize=10)
        axes.set_xlabel("evaluated on")
    panels[0].set_yticks(range(len(calibrations)), labels=list(map(plain, calibrations)))
    panels[0].set_ylabel("calibrated on")
    title = "nats per token above dense (colour: above the best of a column)"
    figure.colorbar(panels[-1].images[0], ax=panels, label="nats above the best", pad=0.01)
    figure.suptitle(f"{plain(method)}: {title}", fontsize=11)
    return figure


def _with_mean(losses: Sequence[Sequence[float]]) -> np.ndarray:
    loss_XY = np.array(losses)
    return np.concatenate([loss_XY, loss_XY.mean(axis=1, keepdims=True)], axis=1)


def _draw(axes: Axes, *, loss_XY: np.ndarray, above_XY: np.ndarray, farthest: float) -> None:
    highest = farthest or 1.0
    axes.imshow(above_XY, cmap="cividis_r", vmin=0, vmax=highest, aspect="auto")
    axes.axvline(loss_XY.shape[1] - 1.5, color="white", linewidth=3)
    for (x, y), loss in np.ndenumerate(loss_XY):
        colour = "white" if above_XY[x, y] > 0.5 * highest else "black"
        axes.text(y, x, f"{round(loss, 2) + 0.0:.2f}", ha="center", va="center", fontsize=8, color=colour)
