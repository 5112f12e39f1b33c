"""Figures over depth: what a layer weighs, what it keeps, how large its activations are."""

# C channels of a layer, E experts, L layers

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from lightning_moe.allocation.smoothing import SMOOTHINGS, smooth
from lightning_moe.records import CalibrationStatistics, ChannelScores, PrunePlan
from lightning_moe.records.statistics import Layers
from lightning_moe.reporting.figures.style import (
    BLUE,
    CATEGORIES,
    GREY,
    LINES,
    ORANGE,
    VERMILLION,
    label_layers,
    new_figure,
    new_panels,
    plain,
)
from lightning_moe.reporting.words import layer_labels

# Values that differ by more than this factor get a log scale.
_WIDE_RANGE = 20.0


def layer_losses(statistics: CalibrationStatistics) -> torch.Tensor:
    """`sum ||R||^2 q` of each layer, float64 [L]: paper A's layer loss but for the factor (1 - alpha)^2."""
    return torch.stack([sums["layer_energy"] for sums in statistics.total()])


def layer_weights(
    statistics: CalibrationStatistics, *, plan: PrunePlan, scores: ChannelScores, smoothing: str = "sqrt4"
) -> Figure:
    """Layer loss raw and smoothed, and below it the plan's coverage and keep ratio (paper A, figure 11).

    Losses and weights are divided by their mean over layers. The coverage is the share of the layer's score that the
    kept channels hold.

    Raises:
        ValueError: the plan was made for another model, or the smoothing is unknown.
    """
    plan.check_fits(statistics.shape)
    figure, (top, bottom) = new_panels(columns=1, rows=2, width=11.0, height=6.2)
    loss_L, labels = layer_losses(statistics), layer_labels(plan.shape)
    raw_L = smooth(loss_L, smoothing="none").numpy()
    top.plot(raw_L, color=GREY, marker="s", markersize=5, linewidth=1.4, label="layer loss")
    smooth_L = smooth(loss_L, smoothing=smoothing).numpy()
    top.plot(smooth_L, color=VERMILLION, marker="o", markersize=5, linewidth=1.8, label=f"smoothed ({smoothing})")
    _finish_weights(top, labels=labels, values=raw_L)
    top.set_title("What each layer weighs")
    kept_L = [float(keep_C.double().mean()) for keep_C in plan.keep]
    held = [
        float(score[keep].sum() / score.sum().clamp(min=1e-300))
        for score, keep in zip(scores.scores, plan.keep, strict=True)
    ]
    bottom.bar(range(len(kept_L)), kept_L, color=BLUE, alpha=0.55, width=0.75, label="keep ratio (channels)")
    bottom.plot(
        held, color=ORANGE, marker="o", markersize=5, linewidth=1.8, label=f"coverage ({plain(scores.criterion)})"
    )
    bottom.set(ylim=(0, 1.04), ylabel="share of the layer", title=f"What it keeps ({plain(plan.method)})")
    bottom.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    label_layers(bottom, labels=labels)
    for axes in (top, bottom):
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def smoothings(statistics: CalibrationStatistics) -> Figure:
    """The layers' weights under each smoothing of their losses, mean 1 each (paper A, figure 12)."""
    figure, axes = new_figure(width=11.0, height=4.4)
    loss_L = layer_losses(statistics)
    for index, name in enumerate(SMOOTHINGS):
        axes.plot(
            smooth(loss_L, smoothing=name).numpy(),
            color=CATEGORIES[index % len(CATEGORIES)],
            linestyle=LINES[index // len(CATEGORIES) % len(LINES)],
            marker="o",
            markersize=4,
            linewidth=2.4 if name == "sqrt4" else 1.4,
            label=name,
        )
    _finish_weights(axes, labels=layer_labels(statistics.shape), values=smooth(loss_L, smoothing="none").numpy())
    axes.set_title("The layers' weights under each smoothing")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, title="smoothing")
    return figure


def _finish_weights(axes: Axes, *, labels: tuple[str, ...], values: np.ndarray) -> None:
    axes.axhline(1.0, color=GREY, linestyle=":", linewidth=1.0)
    if values.max() > _WIDE_RANGE * values.min() > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(bottom=0)
    axes.set_ylabel("weight (1 = mean of the layers)")
    label_layers(axes, labels=labels)


def activation_depth(statistics: CalibrationStatistics, *, after: CalibrationStatistics | None = None) -> Figure:
    """Root mean square of the experts' channels over depth, a line per corpus (paper A, figure 14).

    The mean is over all channels of the experts that a token was routed to: `sum h^2 / sum_e count_e * n_e`.

    Args:
        statistics: Of the dense model.
        after: Of the cut model, as dashed lines.
    """
    figure, axes = new_figure(width=11.0, height=4.4)
    values = []
    for index, (corpus, layers) in enumerate(statistics.corpora.items()):
        colour = CATEGORIES[index % len(CATEGORIES)]
        values.append(channel_rms(statistics, layers=layers))
        axes.plot(values[-1], color=colour, marker="o", markersize=4, linewidth=1.8, label=plain(corpus))
        if after is not None and corpus in after.corpora:
            cut = channel_rms(after, layers=after.corpora[corpus])
            axes.plot(cut, color=colour, linestyle="--", linewidth=1.4, label=plain(f"{corpus}, after the cut"))
    if np.max(values) > _WIDE_RANGE * np.min(values) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(bottom=0)
    axes.set(ylabel="root mean square of a channel", title="How large the experts' activations are, over depth")
    label_layers(axes, labels=layer_labels(statistics.shape))
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, title="corpus")
    return figure


def channel_rms(statistics: CalibrationStatistics, *, layers: Layers) -> list[float]:
    """Root mean square of the channels `h` of each layer, over routed pairs; 0 where nothing was routed."""
    rms = []
    for layer, sums in zip(statistics.shape.layers, layers, strict=True):
        terms = float((sums["count"] * torch.tensor(layer.widths, dtype=torch.float64)).sum())
        rms.append(float(np.sqrt(float(sums["hidden_sq"].sum()) / max(terms, 1.0))))
    return rms
