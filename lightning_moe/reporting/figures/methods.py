"""What a method, its repair and its bits look like, the same in every figure."""

from collections.abc import Iterable
from dataclasses import dataclass

from matplotlib.lines import Line2D

from lightning_moe.reporting.comparison import Setting
from lightning_moe.reporting.figures.style import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILLION, LineStyle, plain

# The methods of this toolkit and of the two papers keep their colours; all others share the rest, dashed.
_OWN = {"exact_global": BLUE, "channel_coverage": SKY, "paper_a": VERMILLION, "tb_coverage": GREEN}
_OTHERS = (ORANGE, PURPLE, "#8C564B", GREY, "#B5A300", "#332288")
_DASHES: tuple[LineStyle, ...] = ("--", ":", "-.")
REPAIRED, UNREPAIRED, RECOVERED = "o", "^", "D"


@dataclass(frozen=True, kw_only=True)
class MethodStyle:
    """Colour and line of one method; `strong` ones are drawn over the others."""

    colour: str
    line: LineStyle
    strong: bool


def method_styles(methods: Iterable[str]) -> dict[str, MethodStyle]:
    """A style for each method, in the order given; up to 22 of them look different."""
    styles, others = {}, 0
    for method in dict.fromkeys(methods):
        if method in _OWN:
            styles[method] = MethodStyle(colour=_OWN[method], line="-", strong=True)
            continue
        line = _DASHES[others // len(_OTHERS) % len(_DASHES)]
        styles[method] = MethodStyle(colour=_OTHERS[others % len(_OTHERS)], line=line, strong=False)
        others += 1
    return styles


def marker_of(setting: Setting) -> str:
    """Circle: repaired; triangle: not; diamond: recovered."""
    return RECOVERED if setting.recovered else REPAIRED if setting.repair else UNREPAIRED


def method_keys(styles: dict[str, MethodStyle]) -> list[Line2D]:
    """A legend's entries for the methods."""
    return [
        Line2D(
            [], [], color=style.colour, linestyle=style.line, linewidth=2.2 if style.strong else 1.6, label=plain(name)
        )
        for name, style in styles.items()
    ]


def setting_keys(settings: Iterable[Setting]) -> list[Line2D]:
    """A legend's entries for the markers that occur, with 16 bit filled and NF4 hollow."""
    settings = list(settings)
    shapes = {REPAIRED: "repaired", UNREPAIRED: "not repaired", RECOVERED: "recovered"}
    used = {marker_of(setting) for setting in settings}
    keys = [_marker_key(marker, face=GREY, label=label) for marker, label in shapes.items() if marker in used]
    fills = {16: ("16 bit (filled)", GREY), 4: ("NF4 (hollow)", "white")}
    present = {setting.bits for setting in settings}
    return keys + [_marker_key("s", face=face, label=label) for bits, (label, face) in fills.items() if bits in present]


def _marker_key(marker: str, *, face: str, label: str) -> Line2D:
    return Line2D([], [], color=GREY, marker=marker, markerfacecolor=face, markersize=7, linestyle="none", label=label)
