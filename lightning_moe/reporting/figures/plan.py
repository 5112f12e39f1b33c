"""Figures of a plan: where the channels go."""

# L layers, E experts

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from lightning_moe.records import PrunePlan
from lightning_moe.reporting.figures.style import BLUE, GREY, VERMILLION, new_figure, plain, thin_ticks
from lightning_moe.reporting.words import layer_labels

# With more experts or layers than this, numbers and large crosses do not fit into the cells.
_MOST_NUMBERED = 24
_MOST_EXPERT_TICKS = 32
_MOST_LAYER_TICKS = 32


def _widths(plan: PrunePlan) -> tuple[np.ndarray, np.ndarray]:
    """Kept width [L, E], NaN where there is no expert (to keep), and whether the plan evicts it, bool [L, E]."""
    num_layers, num_experts = len(plan.shape.layers), max(layer.num_experts for layer in plan.shape.layers)
    width_LE, evicted_LE = np.full((num_layers, num_experts), np.nan), np.zeros((num_layers, num_experts), dtype=bool)
    for index, layer in enumerate(plan.shape.layers):
        present_E = np.array(layer.widths) > 0
        width_LE[index, : layer.num_experts] = np.where(present_E, plan.widths(index), np.nan)
        evicted_LE[index, list(plan.evicted(index))] = True
    return width_LE, evicted_LE


def width_heatmap(plan: PrunePlan) -> Figure:
    """Kept channels of every expert, layers down and experts across; evicted experts carry a cross."""
    width_LE, evicted_LE = _widths(plan)
    num_layers, num_experts = width_LE.shape
    figure, axes = new_figure(
        width=min(13.0, max(7.0, 2.5 + 0.42 * num_experts)), height=min(10.0, max(2.6, 1.3 + 0.36 * num_layers))
    )
    palette = colormaps["cividis"].with_extremes(bad="white")
    highest = max(width for layer in plan.shape.layers for width in layer.widths)
    image = axes.imshow(np.ma.masked_invalid(width_LE), cmap=palette, vmin=0, vmax=highest, aspect="auto")
    figure.colorbar(image, ax=axes, label="kept channels", pad=0.015)
    layer_index, expert_index = np.nonzero(evicted_LE)
    numbered = max(width_LE.shape) <= _MOST_NUMBERED
    size = 42.0 if numbered else 8.0
    axes.scatter(expert_index, layer_index, marker="x", s=size, color="white", linewidths=1.6 if numbered else 0.8)
    if numbered:
        _write_numbers(axes, width_LE=width_LE, highest=highest)
    _label_cells(axes, plan=plan, num_experts=num_experts)
    axes.set_title(f"Kept channels per expert (white cross: evicted, {int(evicted_LE.sum())} in all)")
    return figure


def _write_numbers(axes: Axes, *, width_LE: np.ndarray, highest: int) -> None:
    for (layer_index, expert_index), width in np.ndenumerate(width_LE):
        if width > 0:
            colour = "black" if width > 0.55 * highest else "white"
            axes.text(expert_index, layer_index, f"{width:.0f}", ha="center", va="center", fontsize=8, color=colour)


def _label_cells(axes: Axes, *, plan: PrunePlan, num_experts: int) -> None:
    labels = layer_labels(plan.shape)
    ticks = thin_ticks(len(labels), most=_MOST_LAYER_TICKS)
    axes.set_yticks(ticks, labels=[plain(labels[index]) for index in ticks])
    axes.set_xticks(thin_ticks(num_experts, most=_MOST_EXPERT_TICKS))
    axes.set_xlabel("expert (router order)")
    axes.set_ylabel("layer")


def kept_share(plan: PrunePlan) -> Figure:
    """Share of its channels that each layer keeps, a bar per layer, with the model's mean as a line."""
    labels = layer_labels(plan.shape)
    share_L = [sum(plan.widths(index)) / layer.num_channels for index, layer in enumerate(plan.shape.layers)]
    mean = 1 - plan.achieved_prune_ratio
    figure, axes = new_figure(width=min(13.0, max(7.0, 2.0 + 0.3 * len(labels))), height=3.6)
    bars = axes.bar(range(len(labels)), share_L, color=BLUE, width=0.75)
    if len(labels) <= _MOST_NUMBERED:
        axes.bar_label(bars, labels=[f"{share:.0%}" for share in share_L], padding=2, color=GREY, fontsize=9)
    axes.axhline(mean, color=VERMILLION, linestyle="--", linewidth=1.5, label=f"whole model: {mean:.1%}")
    axes.set_ylim(0, 1.08)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    ticks = thin_ticks(len(labels), most=_MOST_LAYER_TICKS)
    axes.set_xticks(ticks, labels=[plain(labels[index]) for index in ticks])
    axes.set_xlabel("layer")
    axes.set_ylabel("kept channels")
    axes.set_title("Kept share of each layer's channels")
    figure.legend(loc="outside lower right", frameon=False)
    return figure
