"""Every method at every retention (paper B, figure 1)."""

from collections.abc import Mapping, Sequence
from math import fsum, sqrt
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from lightning_moe.reporting.comparison import DENSE, Comparison, Row, Setting, Spread, Variant
from lightning_moe.reporting.figures.frontier import scale_losses, spread_bars
from lightning_moe.reporting.figures.methods import marker_of, setting_keys
from lightning_moe.reporting.figures.style import BLACK, GREY, new_panels, plain, warm_palette

_BITS = {16: "16 bit", 4: "NF4"}


def by_retention(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Mean accuracy of every method, a colour per retention (keep ratio); loss above dense where no tasks were run.

    Bars of an accuracy are one standard error of the mean over tasks, bars of a loss go from the lowest to the highest
    calibration sample. Methods are sorted, best first; 16 bit and NF4 have a panel each. Rows made for a budget, which
    have no ratio, are left out.

    Args:
        rows: The list in `compare.json`, with the dense row.

    Raises:
        ValueError: a broken row, no dense row, or no row with a ratio.
    """
    comparison = Comparison.from_rows(rows)
    pruned = [v for v in comparison.variants if v.setting.ratio is not None and v.setting.method != DENSE]
    if not pruned:
        raise ValueError("Retentions are shown of pruned rows with a `ratio`, got none. Compare at least one method.")
    found = sorted({variant.setting.bits for variant in pruned}, reverse=True)
    methods = _sorted_methods(comparison, variants=pruned)
    height = 1.6 + 0.34 * max(4, len(methods))
    figure, panels = new_panels(columns=len(found), width=4.0 + 4.0 * len(found), height=height, sharey=True)
    for axes, bits in zip(panels, found, strict=True):
        own = [variant for variant in pruned if variant.setting.bits == bits]
        _panel(axes, comparison=comparison, variants=own, methods=methods)
        axes.set_title(_BITS.get(bits, f"{bits} bit"))
    panels[0].set_yticks(range(len(methods)), labels=[plain(method) for method in methods])
    panels[0].set_ylim(len(methods) - 0.4, -0.6)
    ratios = sorted({variant.setting.ratio or 0.0 for variant in pruned})
    figure.legend(handles=_keys(ratios, settings=[v.setting for v in pruned]), loc="outside right upper", frameon=False)
    return figure


def mean_accuracy(row: Row, *, tasks: Sequence[str]) -> float | None:
    """Mean over the tasks; None where one is missing."""
    if not tasks or not set(tasks) <= set(row.tasks):
        return None
    return fsum(row.tasks[task].accuracy for task in tasks) / len(tasks)


def mean_stderr(row: Row, *, tasks: Sequence[str]) -> float:
    """Standard error of the mean over tasks, whose errors are independent: `sqrt(sum s^2) / n`; 0 where unknown."""
    return sqrt(fsum((row.tasks[task].stderr or 0.0) ** 2 for task in tasks)) / len(tasks)


def quality(comparison: Comparison, *, variant: Variant) -> Spread | None:
    """Mean accuracy and its standard error, or loss above dense and its range where no tasks were run."""
    tasks = comparison.tasks
    if not tasks:
        return comparison.loss(variant)
    accuracy = variant.spread(lambda row: mean_accuracy(row, tasks=tasks))
    if accuracy is None:
        return None
    error = max(mean_stderr(row, tasks=tasks) for row in variant.rows)
    return Spread(mean=accuracy.mean, low=accuracy.mean - error, high=accuracy.mean + error)


def _sorted_methods(comparison: Comparison, *, variants: Sequence[Variant]) -> list[str]:
    """Best first, by the mean over all that was measured of a method; methods that broke come last."""
    sign = -1.0 if comparison.tasks else 1.0
    values: dict[str, list[float]] = {}
    for variant in variants:
        measured = quality(comparison, variant=variant)
        values.setdefault(variant.setting.method, []).append(sign * measured.mean if measured else float("inf"))
    return sorted(values, key=lambda method: fsum(values[method]) / len(values[method]))


def _panel(axes: Axes, *, comparison: Comparison, variants: Sequence[Variant], methods: Sequence[str]) -> None:
    ratios = sorted(
        {variant.setting.ratio or 0.0 for variant in comparison.variants if variant.setting.method != DENSE}
    )
    shown = []
    for variant in variants:
        measured = quality(comparison, variant=variant)
        if measured is None:
            continue
        shown.append(measured)
        setting = variant.setting
        # Three thin rows for one method: what was not repaired lies a little lower.
        height = methods.index(setting.method) + (-0.13 if setting.repair else 0.13)
        axes.errorbar(
            measured.mean,
            height,
            xerr=spread_bars([measured]),
            color=retention_colour(setting.ratio or 0.0, ratios=ratios),
            marker=marker_of(setting),
            markersize=7,
            capsize=2.5,
            elinewidth=1.4,
            linestyle="none",
        )
    axes.grid(axis="y", color=GREY, alpha=0.25)
    dense = mean_accuracy(comparison.dense, tasks=comparison.tasks)
    axes.axvline(0.0 if dense is None else dense, color=BLACK, linestyle=":", linewidth=1.2)
    if dense is None:
        scale_losses(axes, losses=shown, axis="x")
        axes.set_xlabel("loss above dense (nats per token)")
    else:
        axes.xaxis.set_major_formatter(PercentFormatter(xmax=1))
        axes.set_xlabel(f"mean accuracy over {len(comparison.tasks)} tasks")


def retention_colour(ratio: float, *, ratios: Sequence[float]) -> Any:
    """Light for little pruning, dark for much."""
    place = sorted(ratios).index(ratio) / max(len(ratios) - 1, 1)
    return warm_palette()(0.1 + 0.8 * place)


def _keys(ratios: Sequence[float], *, settings: Sequence[Setting]) -> list[Line2D]:
    dense = Line2D([], [], color=BLACK, linestyle=":", linewidth=1.2, label=DENSE)
    kept = [
        Line2D([], [], color=retention_colour(ratio, ratios=ratios), linewidth=6, label=f"keeps {1 - ratio:.0%}")
        for ratio in ratios
    ]
    markers = setting_keys(Setting(**{**vars(setting), "bits": 8}) for setting in settings)
    return [dense, *kept, *markers]
