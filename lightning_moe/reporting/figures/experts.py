"""Cheap scores of an expert against what it is worth (paper A, figure 2)."""

# E experts, L layers

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from torch import Tensor

from lightning_moe.records import CalibrationStatistics
from lightning_moe.reporting.figures.style import (
    BLUE,
    GREY,
    VERMILLION,
    add_layer_key,
    label_layers,
    layer_palette,
    new_panels,
)
from lightning_moe.reporting.words import layer_labels

# The sum of each cheap score, and what it is called.
_CHEAP = {"count": "usage (routed tokens)", "gate_weight": "summed router weight"}
# With more experts in all, marks are small.
_MANY_EXPERTS = 500
_COLOURS = {"count": BLUE, "gate_weight": VERMILLION}


def expert_scores(statistics: CalibrationStatistics) -> Figure:
    """Usage and summed router weight of every expert against its exact ablation, and their rank correlation by layer.

    Each score is a share of its layer's sum. Experts that saw no token are left out of the marks and of the
    correlation (Spearman's, inside each layer).
    """
    figure, (left, middle, right) = new_panels(columns=3, width=12.0, height=4.2)
    shares = [_shares(sums) for sums in statistics.total()]
    palette = layer_palette(len(shares))
    for axes, (name, called) in zip((left, middle), _CHEAP.items(), strict=True):
        _scatter(axes, shares=shares, name=name, palette=palette)
        _finish_scatter(axes, called=called, correlations=_correlations(shares, name=name))
    left.set_ylabel("share of the layer's exact ablation")
    add_layer_key(middle, labels=layer_labels(statistics.shape), palette=palette)
    correlations = {name: _correlations(shares, name=name) for name in _CHEAP}
    _correlation_panel(right, correlations=correlations, labels=layer_labels(statistics.shape))
    return figure


def _shares(sums: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Each score as a share of the layer's sum, of the experts that saw a token."""
    seen_E = ((sums["count"] > 0) & (sums["ablation"] > 0)).numpy()
    return {key: (sums[key] / sums[key].sum()).numpy()[seen_E] for key in ("ablation", *_CHEAP)}


def _correlations(shares: Sequence[Mapping[str, np.ndarray]], *, name: str) -> list[float]:
    return [rank_correlation(own[name], own["ablation"]) for own in shares]


def _scatter(axes: Axes, *, shares: Sequence[Mapping[str, np.ndarray]], name: str, palette: Colormap) -> None:
    """In a mixed order, so that no layer hides the others."""
    layer = np.repeat(np.arange(len(shares)), [len(own[name]) for own in shares])
    mixed = np.random.default_rng(0).permutation(len(layer))
    x, y = (np.concatenate([own[key] for own in shares])[mixed] for key in (name, "ablation"))
    many = len(layer) > _MANY_EXPERTS
    alpha, edge = (0.7, 0.0) if many else (1.0, 0.3)
    size = 7 if many else 24
    axes.scatter(x, y, c=palette(layer[mixed]), s=size, alpha=alpha, linewidths=edge, edgecolors="white")


def rank_correlation(first_E: np.ndarray, second_E: np.ndarray) -> float:
    """Spearman's rank correlation, ties at their mean rank; NaN below two experts or where all are alike."""
    first_rank_E, second_rank_E = _ranks(first_E), _ranks(second_E)
    if len(first_E) < 2 or first_rank_E.std() == 0 or second_rank_E.std() == 0:
        return float("nan")
    return float(np.corrcoef(first_rank_E, second_rank_E)[0, 1])


def _ranks(value_E: np.ndarray) -> np.ndarray:
    _, place_E, count = np.unique(value_E, return_inverse=True, return_counts=True)
    return (count.cumsum() - (count - 1) / 2)[place_E]


def _finish_scatter(axes: Axes, *, called: str, correlations: list[float]) -> None:
    axes.set(xscale="log", yscale="log", xlabel=f"share of the layer's {called}", title=called.capitalize())
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
        axis.set_minor_formatter(NullFormatter())
    axes.autoscale(False)
    axes.axline((0.01, 0.01), (1, 1), color=GREY, linestyle=":", linewidth=1.2, zorder=0)
    known = [value for value in correlations if np.isfinite(value)]
    note = f"{round(float(np.mean(known)), 2) + 0.0:.2f} on average" if known else "not defined"
    axes.text(0.04, 0.96, f"rank correlation: {note}", transform=axes.transAxes, va="top")


def _correlation_panel(axes: Axes, *, correlations: Mapping[str, list[float]], labels: tuple[str, ...]) -> None:
    for name, values in correlations.items():
        axes.plot(values, color=_COLOURS[name], marker="o", markersize=4.5, linewidth=1.6, label=_CHEAP[name])
    axes.axhline(0, color=GREY, linewidth=1.0, linestyle=":")
    known = [value for own in correlations.values() for value in own if np.isfinite(value)]
    axes.set_ylim(min([0.0, *known]) - 0.05, 1.05)
    axes.set(ylabel="rank correlation with exact ablation", title="Agreement by layer (1: same order)")
    label_layers(axes, labels=labels, most=12)
    axes.legend(loc="best", frameon=False)
