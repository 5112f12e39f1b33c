"""Quality against size and against compute (paper A, figure 9)."""

from collections.abc import Callable, Mapping, Sequence
from math import floor, log10
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.scale import SymmetricalLogScale
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from lightning_moe.reporting.comparison import DENSE, Comparison, Row, Setting, Spread
from lightning_moe.reporting.figures.methods import MethodStyle, marker_of, method_keys, method_styles, setting_keys
from lightning_moe.reporting.figures.style import BLACK, GREY, new_panels

_UNITS = ((1e9, "billion"), (1e6, "million"), (1e3, "thousand"), (1.0, ""))
_BYTE_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "bytes"))
# Losses from zero up to the smallest power of ten among them are drawn on a straight scale, larger ones on a log scale.
_SMALLEST_DECADE, _LARGEST_DECADE = -4, 0
_FEW_DECADES = 30


def pareto(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Held-out loss above dense against bytes on disk, and against active parameters per token.

    A colour per method, lines through its ratios; circles are repaired, triangles are not, diamonds were recovered;
    filled 16 bit, hollow NF4. A mark is the mean over calibration samples, its bar goes from the lowest to the highest.
    The grey frontier joins the marks that no other beats in both directions. Models that broke, or whose size is not
    known, are left out.

    Args:
        rows: The list in `compare.json`, with the dense row.

    Raises:
        ValueError: a broken row, or no dense row.
    """
    comparison = Comparison.from_rows(rows)
    figure, panels = new_panels(columns=2, width=12.0, height=6.0, sharey=True)
    _panel(panels[0], comparison=comparison, size=lambda row: row.bytes, units=_BYTE_UNITS, what="size on disk")
    _panel(
        panels[1],
        comparison=comparison,
        size=lambda row: row.active_params,
        units=_UNITS,
        what="active parameters per token",
    )
    scale_losses(panels[0], losses=[comparison.loss(variant) for variant in comparison.variants])
    scale_sizes(panels[0])
    panels[0].set_ylabel("loss above dense (nats per token, held-out text)")
    panels[0].set_title("Quality against size (best: lower left)")
    panels[1].set_title("Quality against compute")
    figure.legend(handles=_keys(comparison), loc="outside right upper", frameon=False)
    return figure


def _panel(
    axes: Axes,
    *,
    comparison: Comparison,
    size: Callable[[Row], int | None],
    units: Sequence[tuple[float, str]],
    what: str,
) -> None:
    sized = [(variant, variant.spread(size), comparison.loss(variant)) for variant in comparison.variants]
    points = {variant.setting: (x.mean, loss) for variant, x, loss in sized if x is not None and loss is not None}
    dense = size(comparison.dense)
    divisor, unit = _unit([x for x, _ in points.values()] + [dense or 0.0], units=units)
    points = {setting: (x / divisor, loss) for setting, (x, loss) in points.items()}
    axes.set_xlabel(f"{what} ({unit})" if unit else what)
    axes.axhline(0.0, color=BLACK, linestyle=":", linewidth=1.2)
    styles = method_styles(comparison.methods)
    for line in comparison.lines().values():
        own = {variant.setting: points[variant.setting] for variant in line if variant.setting in points}
        _line(axes, points=own, style=styles[line[0].setting.method])
    unpruned = {s: point for s, point in points.items() if s.method == DENSE}
    means = [(x, loss.mean) for x, loss in points.values()]
    if dense is not None:
        means.append((dense / divisor, 0.0))
        _star(axes, point=means[-1], face=BLACK)
    for setting, (x, loss) in unpruned.items():
        _star(axes, point=(x, loss.mean), face=BLACK if setting.bits == 16 else "white")
    if means:
        band = {"color": GREY, "linewidth": 9, "alpha": 0.25, "zorder": 0.5, "solid_capstyle": "round"}
        axes.plot(*zip(*pareto_frontier(means), strict=True), label="frontier", **band)


def _unit(sizes: Sequence[float], *, units: Sequence[tuple[float, str]]) -> tuple[float, str]:
    return next((unit for unit in units if max(sizes) >= unit[0]), units[-1])


def _star(axes: Axes, *, point: tuple[float, float], face: str) -> None:
    axes.plot(*point, marker="*", color=BLACK, markerfacecolor=face, markersize=14, linestyle="none", zorder=4)


def _line(axes: Axes, *, points: Mapping[Setting, tuple[float, Spread]], style: MethodStyle) -> None:
    """Marks of one line, smallest ratio first."""
    for setting in list(points)[:1]:
        axes.errorbar(
            [x for x, _ in points.values()],
            [loss.mean for _, loss in points.values()],
            yerr=spread_bars([loss for _, loss in points.values()]),
            color=style.colour,
            linestyle=style.line,
            linewidth=1.6 if style.strong else 1.0,
            elinewidth=1.4,
            capsize=2.5,
            marker=marker_of(setting),
            markersize=7.5 if style.strong else 6,
            markerfacecolor=style.colour if setting.bits == 16 else "white",
            alpha=1.0 if style.strong else 0.75,
            zorder=3 if style.strong else 2,
        )


def spread_bars(spreads: Sequence[Spread]) -> list[list[float]]:
    """How far each bar goes below and above its mean, as matplotlib wants it."""
    return [[own.mean - own.low for own in spreads], [own.high - own.mean for own in spreads]]


def pareto_frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (x, y) that no other has both x <= and y <=, by rising x."""
    frontier: list[tuple[float, float]] = []
    for x, y in sorted(set(points)):
        if not frontier or y < frontier[-1][1]:
            frontier.append((x, y))
    return frontier


def scale_losses(axes: Axes, *, losses: Sequence[Spread | None], axis: Literal["x", "y"] = "y") -> None:
    """Zero at an end, a straight scale to the smallest decade of the losses, a log scale from there on."""
    sizes = [abs(loss.mean) for loss in losses if loss is not None and loss.mean]
    lowest = min([loss.low for loss in losses if loss is not None], default=0.0)
    decade = floor(log10(min(sizes))) if sizes else _LARGEST_DECADE
    straight = 10.0 ** min(max(decade, _SMALLEST_DECADE), _LARGEST_DECADE)
    highest = max([*sizes, straight])
    # Side by side, numbers need more room than one above the other.
    steps = (1,) if axis == "x" and highest > _FEW_DECADES * straight else (1, 2, 5)
    ticks = [step * straight * 10**power for power in range(9) for step in steps]
    above, below = ([tick for tick in ticks if tick <= 1.5 * reach] for reach in (highest, -lowest))
    scaled = axes.xaxis if axis == "x" else axes.yaxis
    axes.set(**{f"{axis}scale": SymmetricalLogScale(scaled, linthresh=straight, linscale=0.5)})
    scaled.set_minor_locator(NullLocator())
    scaled.set_major_locator(FixedLocator([*(-tick for tick in reversed(below)), 0.0, *above]))
    scaled.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if lowest >= 0:
        axes.set(**{f"{axis}lim": (-0.15 * straight, None)})


def scale_sizes(axes: Axes) -> None:
    """A log scale with plain numbers."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _keys(comparison: Comparison) -> list[Line2D]:
    dense = Line2D([], [], color=BLACK, marker="*", markersize=12, linestyle=":", linewidth=1.2, label=DENSE)
    frontier = Line2D([], [], color=GREY, linewidth=9, alpha=0.25, label="frontier")
    settings = [variant.setting for variant in comparison.variants]
    return [dense, *method_keys(method_styles(comparison.methods)), *setting_keys(settings), frontier]
