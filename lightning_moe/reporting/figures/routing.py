"""Figure of what the routers did before and after a training run.  L layers, B bins of the entropy."""

from collections.abc import Mapping, Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from lightning_moe.records import CalibrationStatistics
from lightning_moe.reporting.figures.style import CATEGORIES, GREY, LineStyle, new_figure, plain, thin_ticks

_MOST_LAYER_TICKS = 16
# With more layers, marks would hide the lines.
_MOST_MARKED = 32

Depth = Mapping[str, Sequence[float]]


def entropy_depth(before: Depth, *, after: Depth, labels: tuple[str, str] = ("before", "after")) -> Figure:
    """Mean router entropy of each layer, a colour per corpus: dotted before, solid after (paper A, figure 13).

    Where there is no `after`, all lines are solid.

    Args:
        before: corpus -> mean entropy of each MoE layer, as a share of its maximum, the log of its number of experts.
        after: the same; corpora of `before` that are missing get one line.
        labels: what the two are called.
    """
    figure, axes = new_figure(width=8.0, height=4.4)
    colours = {name: CATEGORIES[index % len(CATEGORIES)] for index, name in enumerate(dict.fromkeys([*before, *after]))}
    for name, colour in colours.items():
        _line(axes, entropy_L=before.get(name, ()), colour=colour, filled=not after)
        _line(axes, entropy_L=after.get(name, ()), colour=colour, filled=True)
    num_layers = max(len(entropy_L) for entropy_L in (*before.values(), *after.values()))
    axes.set_xticks(thin_ticks(num_layers, most=_MOST_LAYER_TICKS))
    axes.set_xlabel("MoE layer (first to last)")
    axes.set_ylabel("router entropy (0 %: one expert, 100 %: all alike)")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.margins(x=0.02, y=0.08)
    axes.set_title("How sure the routers are, over depth")
    _add_keys(figure, colours=colours, labels=labels if after else labels[:1])
    return figure


def mean_entropies(statistics: CalibrationStatistics) -> dict[str, list[float]]:
    """Corpus -> mean router entropy of each layer, a share of its maximum, from the middles of the histogram's bins."""
    return {
        corpus: [_middle_mean(sums["entropy_histogram"]) for sums in layers]
        for corpus, layers in statistics.corpora.items()
    }


def _middle_mean(count_B: Tensor) -> float:
    middle_B = (torch.arange(len(count_B), dtype=torch.float64) + 0.5) / len(count_B)
    return float((count_B * middle_B).sum() / count_B.sum().clamp(min=1.0))


def _line(axes: Axes, *, entropy_L: Sequence[float], colour: str, filled: bool) -> None:
    axes.plot(
        range(len(entropy_L)),
        entropy_L,
        color=colour,
        linestyle="-" if filled else ":",
        linewidth=2.0 if filled else 1.4,
        marker="o" if len(entropy_L) <= _MOST_MARKED else "",
        markersize=5 if filled else 4,
        markerfacecolor=colour if filled else "white",
    )


def _add_keys(figure: Figure, *, colours: Mapping[str, str], labels: Sequence[str]) -> None:
    """Two keys: colours are corpora, line styles are times."""
    looks: list[tuple[LineStyle, str]] = [(":", "white"), ("-", GREY)]
    corpora = [Line2D([], [], color=colour, linewidth=3, label=plain(name)) for name, colour in colours.items()]
    times = [
        Line2D([], [], color=GREY, linestyle=style, marker="o", markersize=5, markerfacecolor=fill, label=plain(label))
        for label, (style, fill) in zip(labels, looks[-len(labels) :], strict=True)
    ]
    figure.legend(handles=[*times, *corpora], loc="outside right upper", frameon=False, handlelength=2.6)
