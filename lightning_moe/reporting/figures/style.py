"""One look for all figures: sizes, colours that colour-blind readers can tell apart, safe text."""

from collections.abc import Sequence
from io import BytesIO
from typing import Literal

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, Colormap, ListedColormap
from matplotlib.figure import Figure
from PIL import Image

# Okabe and Ito's palette without its yellow, which is too pale on white.
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
SKY, VERMILLION, BLACK, GREY = "#56B4E9", "#D55E00", "#000000", "#777777"
CATEGORIES = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK)
LineStyle = Literal["-", "--", "-.", ":"]
LINES: tuple[LineStyle, ...] = ("-", "--", "-.", ":")

DPI = 128
_LONGEST_LABEL = 40
_MOST_PIXELS = 2**26
_MOST_TICKS = 12
_MOST_LAYER_TICKS = 24


def new_figure(*, width: float = 9.0, height: float = 4.5) -> tuple[Figure, Axes]:
    """A figure (inches) with one plain axes, not known to pyplot."""
    figure = _figure(width=width, height=height)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def new_panels(
    *, columns: int, rows: int = 1, width: float = 12.0, height: float = 4.5, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure (inches) with plain axes side by side, row by row."""
    figure = _figure(width=width, height=height)
    panels = list(figure.subplots(rows, columns, squeeze=False, sharey=sharey).flat)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _figure(*, width: float, height: float) -> Figure:
    """Its pixels take memory, and how many there are may be up to a file: 4 bytes each, and a few times that to draw.

    Raises:
        ValueError: too many.
    """
    if width * height * DPI**2 > _MOST_PIXELS:
        raise ValueError(
            f"A figure of {width:.0f} x {height:.0f} inches is too large for a page (`report`): a file of results has "
            "too many rows, corpora or sizes. Report fewer at a time."
        )
    return Figure(figsize=(width, height), layout="constrained")


def plain(text: str) -> str:
    """Text from a file as a label: no mathematics, no line breaks, not endless, never hidden from a legend."""
    printable = "".join(character if character.isprintable() else " " for character in text).strip()
    short = printable if len(printable) <= _LONGEST_LABEL else printable[: _LONGEST_LABEL - 1] + "…"
    return ("\u200a" + short if short.startswith("_") else short).replace("$", r"\$")


def layer_palette(num_layers: int) -> ListedColormap:
    """One colour per layer, dark to light with depth."""
    return ListedColormap(colormaps["viridis"](np.linspace(0, 0.92, num_layers)))


def warm_palette() -> ListedColormap:
    """Pale to dark for a share; no end of it vanishes on white."""
    return ListedColormap(colormaps["plasma_r"](np.linspace(0.12, 1.0, 256)))


def label_layers(axes: Axes, *, labels: Sequence[str], most: int = _MOST_LAYER_TICKS) -> None:
    """A horizontal axis over the layers, with `most` labels where there are many."""
    ticks = thin_ticks(len(labels), most=most)
    axes.set_xticks(ticks, labels=[plain(labels[index]) for index in ticks])
    axes.set_xlim(-0.5, len(labels) - 0.5)
    axes.set_xlabel("layer")


def add_layer_key(axes: Axes, *, labels: Sequence[str], palette: Colormap) -> None:
    """A colour bar that says which colour is which layer."""
    num_layers = len(labels)
    norm = BoundaryNorm(np.arange(num_layers + 1) - 0.5, num_layers)
    ticks = thin_ticks(num_layers)
    bar = axes.figure.colorbar(ScalarMappable(norm=norm, cmap=palette), ax=axes, ticks=ticks, label="layer", pad=0.02)
    bar.ax.set_yticks(ticks, labels=[plain(labels[index]) for index in ticks])
    bar.ax.minorticks_off()


def thin_ticks(count: int, *, most: int = _MOST_TICKS) -> list[int]:
    """At most `most` evenly spaced indices below `count`, the first one included."""
    return list(range(0, count, -(-count // most)))


def png_bytes(figure: Figure) -> bytes:
    """The figure as PNG of 256 colours, a third of the size of all; the same figure gives the same bytes."""
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(DPI)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    buffer = BytesIO()
    image.quantize(256, dither=Image.Dither.NONE).save(buffer, format="png", optimize=True)
    return buffer.getvalue()
