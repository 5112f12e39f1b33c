"""Figures of what a run measured."""

import math
from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox

from lightning_moe.reporting.figures.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    new_figure,
    plain,
)
from lightning_moe.reporting.summary import (
    BASELINES,
    CONTROL,
    GROUPS,
    OURS,
    OURS_NF4,
    PAPER_A,
    RECOVERED,
    UNPRUNED,
    Result,
    Summary,
)

_COLOUR: Mapping[str, str] = {
    UNPRUNED: BLACK,
    OURS: BLUE,
    OURS_NF4: SKY,
    RECOVERED: GREEN,
    CONTROL: PURPLE,
    PAPER_A: VERMILLION,
    BASELINES: ORANGE,
}
_MARKER: Mapping[str, str] = {
    UNPRUNED: "*",
    OURS: "o",
    OURS_NF4: "s",
    RECOVERED: "D",
    CONTROL: "P",
    PAPER_A: "^",
    BASELINES: "v",
}
# Where a label may go, in points from its marker: beside, above, below, then further away.
_OFFSETS = [(sign * 9, rise) for rise in (0, 10, -10, 20, -20, 30, -30, 42, -42, 54, 66, 78, 90) for sign in (1, -1)]


def stage_losses(summary: Summary) -> Figure:
    """Loss above dense of every result, nats per token, as bars in groups; the dense model is the zero line."""
    grouped = {group: [result for result in summary.others if result.group == group] for group in GROUPS}
    lines = [line for group, results in grouped.items() if results for line in (group, *results)]
    figure, axes = new_figure(height=1.4 + 0.27 * len(lines))
    losses = [summary.loss(line) for line in lines if isinstance(line, Result)]
    reach = max([abs(loss) for loss in losses if math.isfinite(loss)], default=0.0) or 1.0
    for position, line in enumerate(lines):
        if isinstance(line, Result):
            _bar(axes, position=position, loss=summary.loss(line), group=line.group, gap=0.01 * reach)
    names = [plain(line.name) if isinstance(line, Result) else line for line in lines]
    axes.set_yticks(range(len(lines)), labels=names)
    for tick, line in zip(axes.get_yticklabels(), lines, strict=True):
        tick.set_fontweight("normal" if isinstance(line, Result) else "bold")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_ylim(-0.6, len(lines) - 0.4)
    axes.invert_yaxis()
    axes.axvline(0, color=BLACK, linewidth=0.8)
    axes.margins(x=0.12)
    axes.set_xlabel("loss above dense (nats per token, lower is better)")
    axes.set_title("What each step costs")
    return figure


def _bar(axes: Axes, *, position: int, loss: float, group: str, gap: float) -> None:
    if not math.isfinite(loss):
        axes.text(gap, position, "not finite", va="center", fontsize=9, color=VERMILLION)
        return
    axes.barh(position, loss, color=_COLOUR[group], height=0.72)
    side = "left" if loss >= 0 else "right"
    axes.text(loss + math.copysign(gap, loss), position, f"{loss:+.4f}", va="center", ha=side, fontsize=9)


def quality_against_bytes(summary: Summary) -> Figure:
    """Loss above dense (nats per token) against bytes on disk, one labelled point per result, bytes in log scale.

    Results whose bytes are not known or whose loss is not finite are left out.
    """
    points = [
        (result, result.bytes / 1e6, summary.loss(result))
        for result in summary.results
        if result.bytes and math.isfinite(summary.loss(result))
    ]
    figure, axes = new_figure(height=6.0)
    axes.set_xscale("log")
    for group in GROUPS:
        own = [(megabytes, loss) for result, megabytes, loss in points if result.group == group]
        if own:
            axes.scatter(
                *zip(*own, strict=True), color=_COLOUR[group], marker=_MARKER[group], s=60, label=group, zorder=3
            )
    axes.axhline(0, color=GREY, linestyle=":", linewidth=1.2)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.18, y=0.1)
    axes.set_xlabel("size on disk (MB = million bytes, log scale)")
    axes.set_ylabel("loss above dense (nats per token)")
    axes.set_title("Quality against size (best: lower left)")
    if points:
        figure.legend(loc="outside right upper", frameon=False)
    _place_labels(
        axes, figure=figure, texts=[(plain(result.name), (megabytes, loss)) for result, megabytes, loss in points]
    )
    return figure


def _place_labels(axes: Axes, *, figure: Figure, texts: list[tuple[str, tuple[float, float]]]) -> None:
    """Gives every label the first free place around its point, tied to it by a thin line."""
    figure.draw_without_rendering()
    points_to_pixels = figure.dpi / 72
    centres = [axes.transData.transform(point) for _, point in texts]
    taken = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in centres]
    for (text, point), (x, y) in zip(texts, centres, strict=True):
        label = axes.annotate(text, point, fontsize=9)
        extent = label.get_window_extent()
        label.remove()
        places = [(right * points_to_pixels, up * points_to_pixels) for right, up in _OFFSETS]
        boxes = [
            Bbox.from_bounds(x + right - (extent.width if right < 0 else 0), y + up - extent.height / 2, *extent.size)
            for right, up in places
        ]
        best = next((index for index, box in enumerate(boxes) if _is_free(box, axes=axes, taken=taken)), 0)
        taken.append(boxes[best])
        _tie(axes, text=text, point=point, offset=_OFFSETS[best])


def _is_free(box: Bbox, *, axes: Axes, taken: list[Bbox]) -> bool:
    corners_inside = axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max)
    return corners_inside and not any(box.overlaps(other) for other in taken)


def _tie(axes: Axes, *, text: str, point: tuple[float, float], offset: tuple[int, int]) -> None:
    label = axes.annotate(
        text,
        point,
        offset,
        textcoords="offset points",
        fontsize=9,
        ha="left" if offset[0] > 0 else "right",
        va="center",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8},
        arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3},
    )
    # A long label must not squeeze the axes: the places were measured for their size.
    label.set_in_layout(False)
