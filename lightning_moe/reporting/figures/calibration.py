"""Figures of what calibration saw, and of what a plan made of it."""

# L layers, C channels of a layer, E experts, B bins of the router entropy

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from lightning_moe.records import CalibrationStatistics, ChannelScores, PrunePlan
from lightning_moe.reporting.figures.style import (
    CATEGORIES,
    GREY,
    LINES,
    add_layer_key,
    layer_palette,
    new_figure,
    plain,
)
from lightning_moe.reporting.words import layer_labels

# A curve of more points looks no different.
_MOST_POINTS = 400


def _curve(score_C: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Share of channels and share of score, best channel first, from (0, 0) to (1, 1)."""
    total_C = torch.cat([score_C.new_zeros(1), score_C.sort(descending=True).values.cumsum(0)])
    share_C = (total_C / total_C[-1]).numpy() if total_C[-1] > 0 else np.linspace(0, 1, len(total_C))
    taken = np.unique(np.linspace(0, len(share_C) - 1, _MOST_POINTS).round().astype(int))
    return taken / (len(share_C) - 1), share_C[taken]


def score_curves(scores: ChannelScores, *, plan: PrunePlan | None = None) -> Figure:
    """Share of a layer's score that its best channels hold, a curve per layer; a dot where the plan keeps them.

    The dot is what the plan really keeps: below its curve where the plan did not take the layer's best channels.

    Args:
        scores: Of one channel criterion.
        plan: For the same model; no dots without it.

    Raises:
        ValueError: the plan was made for another model.
    """
    if plan is not None:
        plan.check_fits(scores.shape)
    figure, axes = new_figure(width=8.0, height=5.0)
    palette = layer_palette(len(scores.scores))
    for index, score_C in enumerate(scores.scores):
        axes.plot(*_curve(score_C), color=palette(index), linewidth=1.6)
        total = float(score_C.sum())
        if plan is not None and total > 0:
            keep_C = plan.keep[index]
            kept = float(keep_C.double().mean()), float(score_C[keep_C].sum()) / total
            axes.plot(
                *kept,
                marker="o",
                markersize=8,
                color=palette(index),
                markeredgecolor="black",
                linestyle="none",
                zorder=3,
            )
    axes.plot([0, 1], [0, 1], color=GREY, linestyle=":", linewidth=1.2)
    axes.annotate("all channels alike", (0.72, 0.70), color=GREY, fontsize=9, va="top")
    axes.set(xlim=(0, 1.01), ylim=(0, 1.02), xlabel="share of the layer's channels, best first")
    axes.set_ylabel(f"share of the layer's score ({plain(scores.criterion)})")
    axes.xaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.set_title("How few channels hold the score" + (" (dots: kept)" if plan is not None else ""))
    add_layer_key(axes, labels=layer_labels(scores.shape), palette=palette)
    return figure


def usage_against_width(statistics: CalibrationStatistics, *, plan: PrunePlan) -> Figure:
    """Kept share of each expert's width against its share of the layer's routed tokens; crosses are evicted experts.

    Raises:
        ValueError: the plan was made for another model.
    """
    plan.check_fits(statistics.shape)
    figure, axes = new_figure(width=8.0, height=4.6)
    palette = layer_palette(len(statistics.shape.layers))
    for index, (layer, sums) in enumerate(zip(statistics.shape.layers, statistics.total(), strict=True)):
        before_E, width_E = np.array(layer.widths), np.array(plan.widths(index))
        usage_E = (sums["count"] / sums["count"].sum()).numpy()
        kept_E = width_E > 0
        evicted_E = ~kept_E & (before_E > 0)
        share_E = width_E[kept_E] / before_E[kept_E]
        axes.scatter(usage_E[kept_E], share_E, color=palette(index), s=34, edgecolors="white", linewidths=0.5)
        axes.scatter(
            usage_E[evicted_E], np.zeros(evicted_E.sum()), color=palette(index), s=46, marker="x", clip_on=False
        )
    even = {1 / layer.num_experts for layer in statistics.shape.layers}
    for share in even:
        axes.axvline(share, color=GREY, linestyle=":", linewidth=1.2)
    axes.annotate(" even use", (max(even), 1.06), color=GREY, fontsize=9)
    axes.set(ylim=(0, 1.12), xlabel="share of the layer's routed tokens", ylabel="kept share of the expert's width")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.set_title("Use of an expert and what it keeps (cross: evicted)")
    add_layer_key(axes, labels=layer_labels(statistics.shape), palette=palette)
    return figure


def router_entropy(statistics: CalibrationStatistics) -> Figure:
    """Distribution of the routers' entropy over tokens of all layers, a line per corpus.

    The entropy is of the router's probabilities over its E experts, as a share of its maximum log E.
    """
    figure, axes = new_figure(width=8.0, height=4.0)
    for index, (corpus, layers) in enumerate(statistics.corpora.items()):
        count_B = torch.stack([layer["entropy_histogram"] for layer in layers]).sum(0)
        share_B = (count_B / count_B.sum().clamp(min=1.0)).numpy()
        edges = np.linspace(0, 1, len(share_B) + 1)
        line = LINES[index % len(LINES)]
        axes.stairs(
            share_B,
            edges,
            color=CATEGORIES[index % len(CATEGORIES)],
            linestyle=line,
            linewidth=1.8,
            label=plain(corpus),
        )
    axes.set(xlim=(0, 1), xlabel="router entropy (share of its maximum, log of the number of experts)")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("share of tokens")
    axes.xaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.set_title("How sure the routers are (left: one expert, right: all alike)")
    figure.legend(loc="outside right upper", frameon=False, title="corpus")
    return figure
