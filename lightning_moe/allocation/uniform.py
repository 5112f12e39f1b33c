"""One width for every expert: the smaller stock model that any engine loads."""

# C channels of a layer

import torch
from torch import Tensor

from lightning_moe.allocation.budget import check_count, check_prune_ratio, keep_everything
from lightning_moe.allocation.ranking import keep_top_channels
from lightning_moe.records import ChannelScores


def uniform_width(scores: ChannelScores, *, prune_ratio: float, align: int = 16) -> tuple[Tensor, ...]:
    """Every expert keeps its `round((1 - prune_ratio) * width / align) * align` best channels, at least one block.

    The achieved ratio differs from the asked one by the rounding; the plan reports it.

    Args:
        scores: Channel scores; only their order inside an expert counts.
        prune_ratio: Share of channels to remove, in [0, 1); 0 keeps everything.
        align: The width is a multiple of this.

    Returns:
        Per layer bool [C], true for a channel that stays.

    Raises:
        ValueError: a setting out of range, experts of different widths, or an `align` wider than an expert.
    """
    check_prune_ratio(prune_ratio)
    check_count(align, name="align", lowest=1)
    if prune_ratio == 0:
        return keep_everything(scores.shape)
    widths = {layer.name: sorted(set(layer.widths)) for layer in scores.shape.layers}
    stock = sorted({width for own in widths.values() for width in own})
    if len(stock) > 1:
        name = next(name for name, own in widths.items() if own != [stock[0]])
        raise ValueError(f"A uniform width needs experts of one width, {name} has {widths[name]}, the model {stock}.")
    kept = kept_width(stock[0], prune_ratio=prune_ratio, align=align)
    return tuple(
        keep_top_channels(score_C, widths=layer.widths, kept_E=torch.full((layer.num_experts,), kept))
        for layer, score_C in zip(scores.shape.layers, scores.scores, strict=True)
    )


def kept_width(width: int, *, prune_ratio: float, align: int) -> int:
    """What an expert of `width` channels keeps: the nearest multiple of `align`, at least one block; all at ratio 0.

    Raises:
        ValueError: a setting out of range, or an `align` wider than the expert.

    Examples:
        >>> kept_width(100, prune_ratio=0.5, align=16)  # 50 is nearest to three blocks
        48
    """
    check_prune_ratio(prune_ratio)
    check_count(align, name="align", lowest=1)
    if align > width:
        raise ValueError(f"`align`={align} is wider than the experts, {width} channels. Choose a smaller one.")
    num_blocks = round((1 - prune_ratio) * width / align)
    return width if prune_ratio == 0 else align * min(max(num_blocks, 1), width // align)
