"""Curves of channel scores: how concentrated they are, and what a cut of them costs."""

# C channels of a layer, E experts, n channels of an expert, L layers

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from lightning_moe.records import CalibrationStatistics, ChannelScores, ExpertScores, PrunePlan
from lightning_moe.reporting.figures.style import (
    BLACK,
    CATEGORIES,
    add_layer_key,
    label_layers,
    layer_palette,
    new_figure,
    new_panels,
    plain,
    warm_palette,
)
from lightning_moe.reporting.words import layer_labels

# A curve of more points looks no different.
_MOST_POINTS = 200
# With more experts, the dots at the kept widths are small.
_MOST_LARGE_DOTS = 32
_SHARES = (0.10, 0.25, 0.50)


def thin(num_points: int) -> np.ndarray:
    """At most 200 evenly spaced indices below `num_points`, first and last included."""
    return np.unique(np.linspace(0, num_points - 1, _MOST_POINTS).round().astype(int))


def rising_share(score_n: Tensor) -> np.ndarray:
    """Share of the score that the best 0, 1, ... n channels hold, `[n + 1]`; a straight line where all scores are 0."""
    total_n = torch.cat([score_n.new_zeros(1), score_n.sort(descending=True).values.cumsum(0)])
    return (total_n / total_n[-1]).numpy() if total_n[-1] > 0 else np.linspace(0, 1, len(total_n))


def telling_layers(plan: PrunePlan) -> dict[int, str]:
    """Index of the first, middle, last and most cut layer, and which of these it is; fewer where they coincide."""
    last = len(plan.shape.layers) - 1
    kept_L = [float(keep_C.double().mean()) for keep_C in plan.keep]
    named: dict[int, list[str]] = {}
    for index, role in ((0, "first"), (last // 2, "middle"), (last, "last"), (int(np.argmin(kept_L)), "most cut")):
        named.setdefault(index, []).append(role)
    return {index: ", ".join(named[index]) for index in sorted(named)}


def expert_curves(scores: ChannelScores, *, weights: ExpertScores, plan: PrunePlan) -> Figure:
    """Cumulative channel score of every expert with its kept width, coloured by its weight (paper A, figures 15, 16).

    One panel for the first, the middle, the last and the most cut layer. A curve is the share of the expert's own score
    that its best channels hold; its dot is what the plan keeps of it; experts that go as a whole are dashed.

    Args:
        scores: Of one channel criterion.
        weights: Of one expert criterion (paper A: attribution).
        plan: For the same model.

    Raises:
        ValueError: the plan was made for another model.
    """
    plan.check_fits(scores.shape)
    layers = telling_layers(plan)
    columns = 2 if len(layers) == 4 else len(layers)
    rows = len(layers) // columns
    figure, panels = new_panels(columns=columns, rows=rows, width=12.0, height=4.0 * rows, sharey=True)
    norm, palette = PowerNorm(0.5, vmin=0, vmax=1), warm_palette()
    for axes, (index, role) in zip(panels, layers.items(), strict=True):
        weight_E = weights.scores[index]
        share_E = (weight_E / weight_E.max()).numpy() if weight_E.max() > 0 else np.zeros(len(weight_E))
        _expert_panel(axes, scores=scores, plan=plan, index=index, colours=palette(norm(share_E)))
        kept, lost = float(plan.keep[index].double().mean()), len(plan.evicted(index))
        label = plain(layer_labels(plan.shape)[index])
        fate = f"; {lost} of {plan.shape.layers[index].num_experts} experts lost" if lost else ""
        axes.set_title(f"layer {label} ({role})\nkeeps {kept:.0%}{fate}")
    figure.supxlabel("channels of the expert, best first", fontsize="medium")
    figure.supylabel(f"share of the expert's score ({plain(scores.criterion)})", fontsize="medium")
    bar = figure.colorbar(ScalarMappable(norm=norm, cmap=palette), ax=panels, pad=0.015, aspect=18 * rows)
    bar.set_label(f"expert's {plain(weights.criterion)} (1 = highest of its layer)")
    return figure


def _expert_panel(axes: Axes, *, scores: ChannelScores, plan: PrunePlan, index: int, colours: np.ndarray) -> None:
    widths = plan.shape.layers[index].widths
    parts = zip(scores.scores[index].split(widths), plan.keep[index].split(widths), colours, strict=True)
    size = 6.5 if len(widths) <= _MOST_LARGE_DOTS else 4.0
    for score_n, keep_n, colour in parts:
        if not len(score_n):
            continue
        taken, share = thin(len(score_n) + 1), rising_share(score_n)
        lost = not bool(keep_n.any())
        axes.plot(taken, share[taken], color=colour, linewidth=1.1, linestyle="--" if lost else "-", alpha=0.85)
        if not lost and float(score_n.sum()) > 0:
            held = float(score_n[keep_n].sum() / score_n.sum())
            axes.plot(
                int(keep_n.sum()), held, marker="o", color=colour, markersize=size, markeredgecolor=BLACK, zorder=3
            )
    axes.set(xlim=(0, max(widths) * 1.02), ylim=(0, 1.04))
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))


def cut_cost(scores: ChannelScores, *, statistics: CalibrationStatistics) -> Figure:
    """Cumulative channel score, and layer output loss, against the prune ratio, a line per layer (paper A, figure 4).

    Channels go in the order of `scores`, lowest first. Left: share of the layer's score that stays. Right: exact
    ablations of the removed channels added up, per token: the relative squared error of the layer's output with cross
    terms between channels left out. Black: mean over layers, dashed: the same had the channels gone by their ablation.

    Raises:
        ValueError: the scores belong to another model.
    """
    if scores.shape != statistics.shape:
        raise ValueError("Scores and statistics belong to models of different shape. Score these statistics.")
    figure, (left, right) = new_panels(columns=2, width=12.0, height=4.6)
    palette, at = layer_palette(len(scores.scores)), np.linspace(0, 1, _MOST_POINTS)
    losses, best = [], []
    for index, (score_C, sums) in enumerate(zip(scores.scores, statistics.total(), strict=True)):
        error_C = sums["channel_ablation"] * statistics.weights[index]["down_sq_norm"] / sums["num_tokens"]
        losses.append(np.interp(at, *removed(score_C, order_C=score_C, value_C=error_C)))
        best.append(np.interp(at, *removed(score_C, order_C=error_C, value_C=error_C)))
        ratio, gone = removed(score_C, order_C=score_C, value_C=score_C)
        left.plot(at, 1 - np.interp(at, ratio, gone) / max(gone[-1], 1e-300), color=palette(index), linewidth=1.5)
        right.plot(at[1:], losses[-1][1:], color=palette(index), linewidth=1.3)
    right.plot(at[1:], np.mean(losses, axis=0)[1:], color=BLACK, linewidth=2.2, label="mean of the layers")
    label = "the same, by exact ablation"
    right.plot(at[1:], np.mean(best, axis=0)[1:], color=BLACK, linewidth=2.2, linestyle="--", label=label)
    _finish_cut_cost(left, right, criterion=plain(scores.criterion))
    add_layer_key(right, labels=layer_labels(scores.shape), palette=palette)
    return figure


def removed(score_C: Tensor, *, order_C: Tensor, value_C: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(prune ratio, summed value of the removed channels) with 0, 1, ... C channels gone, lowest `order_C` first."""
    gone = torch.cat([value_C.new_zeros(1), value_C[order_C.argsort(stable=True)].cumsum(0)]).numpy()
    return np.linspace(0, 1, len(score_C) + 1), gone


def _finish_cut_cost(left: Axes, right: Axes, *, criterion: str) -> None:
    for axes in (left, right):
        axes.set(xlim=(0, 1), xlabel=f"prune ratio of the layer (lowest {criterion} first)")
        axes.xaxis.set_major_formatter(PercentFormatter(xmax=1))
    left.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    left.set(ylim=(0, 1.02), ylabel="share of the layer's score that stays", title="Channel score that stays")
    right.set_yscale("log")
    right.set(ylabel="relative squared error of the layer's output", title="Layer output loss (cross terms left out)")
    lowest, highest = right.get_ylim()
    right.set_ylim(bottom=max(lowest, highest * 1e-7))
    right.legend(loc="lower right", frameon=False)


def concentration(scores: ChannelScores) -> Figure:
    """Share of each layer's score that its best 10, 25 and 50 % of channels hold; dotted where all were alike."""
    figure, axes = new_figure(width=10.0, height=4.2)
    for share, colour in zip(_SHARES, CATEGORIES, strict=False):
        held_L = [held_by_best(score_C, share=share) for score_C in scores.scores]
        axes.plot(range(len(held_L)), held_L, color=colour, marker="o", markersize=5, linewidth=1.8)
        axes.axhline(share, color=colour, linestyle=":", linewidth=1.0)
        axes.annotate(f"  best {share:.0%}", (len(held_L) - 1, held_L[-1]), color=colour, va="center")
    axes.set(ylim=(0, 1.02), ylabel=f"share of the layer's score\n({plain(scores.criterion)})")
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.set_title("How few channels hold each layer's score")
    label_layers(axes, labels=layer_labels(scores.shape))
    return figure


def held_by_best(score_C: Tensor, *, share: float) -> float:
    """Share of the score that the best `share` of the channels hold (rounded to whole channels)."""
    return float(rising_share(score_C)[round(share * len(score_C))])
