"""How many channels may stay, counted exactly.

With a ratio above 0 every kept width is a multiple of `align`: where a stock width is not (100 channels in blocks of
16), the expert's last, partial block goes first. Only ratio 0 keeps it.
"""

# L layers, C channels of a layer

import torch
from torch import Tensor

from lightning_moe.allocation.ranking import order_by
from lightning_moe.records import LayerShape, ModelShape

_WIDE = 512
_WIDE_BLOCK = 64
_NARROW_BLOCK = 16


def check_count(value: int, *, name: str, lowest: int) -> None:
    """Refuses what is not a whole number >= `lowest`.

    Raises:
        ValueError: with the name of the setting and what came.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        raise ValueError(f"`{name}` must be a whole number >= {lowest}, got {value!r}.")


def check_prune_ratio(prune_ratio: float) -> None:
    """Refuses a share of removed channels outside [0, 1).

    Raises:
        ValueError: with the value.
    """
    if isinstance(prune_ratio, bool) or not isinstance(prune_ratio, int | float) or not 0 <= prune_ratio < 1:
        raise ValueError(
            f"`prune_ratio` must be in [0, 1), got {prune_ratio!r}. It is the share of routed-expert channels that is "
            "removed; `keep_ratio` is 1 minus it."
        )


def resolve_prune_ratio(*, prune_ratio: float | None, keep_ratio: float | None) -> float:
    """The share of channels to remove, from exactly one of the two words for it: `prune_ratio` = 1 - `keep_ratio`.

    Args:
        prune_ratio: Share that goes, in [0, 1).
        keep_ratio: Share that stays, in (0, 1].

    Returns:
        The prune ratio, rounded to 12 decimals where it comes from `keep_ratio` (0.9 is 0.1, not 0.09999999999999998).

    Raises:
        ValueError: both or none are given, or the one given is out of range.

    Examples:
        >>> resolve_prune_ratio(prune_ratio=None, keep_ratio=0.9)
        0.1
    """
    if (prune_ratio is None) == (keep_ratio is None):
        raise ValueError(
            f"Give exactly one of `prune_ratio` (the share that goes) and `keep_ratio` (1 minus it), "
            f"got prune_ratio={prune_ratio} and keep_ratio={keep_ratio}."
        )
    if keep_ratio is None:
        assert prune_ratio is not None
        check_prune_ratio(prune_ratio)
        return prune_ratio
    if isinstance(keep_ratio, bool) or not isinstance(keep_ratio, int | float) or not 0 < keep_ratio <= 1:
        raise ValueError(
            f"`keep_ratio` must be in (0, 1], got {keep_ratio!r}. It is the share of routed-expert channels that "
            "stays; `prune_ratio` is 1 minus it."
        )
    return round(1.0 - keep_ratio, 12)


def resolve_align(align: int | None, *, shape: ModelShape) -> int:
    """Channels of a block: `align` itself, or the default for these widths (method, 3).

    Returns:
        Where `align` is None, 64 if the widest expert has 512 channels or more and they are a multiple of 64, else 16.
    """
    if align is not None:
        return align
    widest = max(width for layer in shape.layers for width in layer.widths)
    return _WIDE_BLOCK if widest >= _WIDE and widest % _WIDE_BLOCK == 0 else _NARROW_BLOCK


def channel_budget(shape: ModelShape, *, prune_ratio: float) -> int:
    """Channels of the whole model that stay: `round((1 - prune_ratio) * num_channels)`.

    Raises:
        ValueError: `prune_ratio` outside [0, 1).
    """
    check_prune_ratio(prune_ratio)
    return round((1 - prune_ratio) * shape.num_channels)


def whole_blocks(layer: LayerShape, *, align: int) -> int:
    """Whole blocks of `align` channels in the layer's experts."""
    return sum(width // align for width in layer.widths)


def block_budget(shape: ModelShape, *, prune_ratio: float, align: int) -> int:
    """Blocks of the whole model that stay: the channel budget in whole blocks of `align`, rounded down.

    Raises:
        ValueError: a ratio or `align` out of range, or experts that have fewer whole blocks than that.

    Examples:
        >>> block_budget(shape_of([100, 100]), prune_ratio=0.25, align=16)  # 150 channels are 9.375 blocks
        9
    """
    check_count(align, name="align", lowest=1)
    num_blocks = channel_budget(shape, prune_ratio=prune_ratio) // align
    available = sum(whole_blocks(layer, align=align) for layer in shape.layers)
    if num_blocks > available:
        raise ValueError(
            f"`prune_ratio`={prune_ratio} keeps {num_blocks} blocks of `align`={align} channels, but experts of widths "
            f"{sorted({width for layer in shape.layers for width in layer.widths})} have only {available} whole ones. "
            "Choose an `align` that divides the widths, or prune more."
        )
    return num_blocks


def round_to_blocks(channel_L: Tensor, *, capacity_L: Tensor, num_blocks: int, align: int) -> Tensor:
    """Whole blocks per layer that sum to `num_blocks`, by largest remainder of the layers' channel budgets.

    Args:
        channel_L: Channel budgets, int64 [L].
        capacity_L: Whole blocks that each layer has, int64 [L]; their sum is at least `num_blocks`.
        num_blocks: Blocks of the whole model.
        align: Channels of a block.

    Returns:
        Blocks per layer, int64 [L].

    Examples:
        >>> capacity_L = torch.tensor([4, 4])
        >>> round_to_blocks(torch.tensor([40, 24]), capacity_L=capacity_L, num_blocks=4, align=16).tolist()  # 2.5, 1.5
        [3, 1]
    """
    block_L = torch.minimum(channel_L // align, capacity_L)
    while (missing := num_blocks - int(block_L.sum())) > 0:
        order_L = order_by((block_L < capacity_L).long(), channel_L - block_L * align)
        takers = order_L[: min(missing, int((block_L < capacity_L).sum()))]
        block_L[takers] += 1
    return block_L


def keep_everything(shape: ModelShape) -> tuple[Tensor, ...]:
    """The masks of ratio 0: bool [C] per layer, all true."""
    return tuple(torch.ones(layer.num_channels, dtype=torch.bool) for layer in shape.layers)
