"""Paper A from statistics to masks: coverage across layers, coverage inside a layer, alignment."""

# L layers, C channels of a layer, E experts

import torch
from torch import Tensor

from lightning_moe.allocation.alignment import Alignment, Demand, align_widths, fewest_blocks
from lightning_moe.allocation.budget import (
    block_budget,
    channel_budget,
    check_prune_ratio,
    keep_everything,
    round_to_blocks,
    whole_blocks,
)
from lightning_moe.allocation.coverage import cover
from lightning_moe.allocation.floors import Floors
from lightning_moe.allocation.ranking import keep_top_channels
from lightning_moe.records import ChannelScores, ExpertScores, LayerShape


def layer_budgets(
    scores: ChannelScores, *, weight_L: Tensor, prune_ratio: float, alignment: Alignment, floors: Floors
) -> Tensor:
    """Blocks per layer, int64 [L]: coverage of the layers' pooled channels, weighted by their smoothed loss.

    Paper A, algorithm 1 across layers; the counts are exact in channels first, then in whole blocks. A layer gets at
    least what its floor asks for, and what the experts take that a token needs.

    Raises:
        ValueError: a budget that the experts or the floors cannot meet: names the layer that needs most.
    """
    shape, align = scores.shape, alignment.align
    num_blocks = block_budget(shape, prune_ratio=prune_ratio, align=align)
    expert_floors = floors.expert_channels(shape, least=alignment.min_width)
    least = [
        max(floor, fewest_blocks(layer, floor_E=floor_E, alignment=alignment))
        for layer, floor, floor_E in zip(
            shape.layers, floors.layer_blocks(shape, align=align), expert_floors, strict=True
        )
    ]
    if sum(least) > num_blocks:
        most = max(least)
        layer = shape.layers[least.index(most)]
        raise ValueError(
            f"The budget is {num_blocks} blocks of `align`={align} channels, but the layers need {sum(least)}; "
            f"{layer.name} alone needs {most} (top_k={layer.top_k} experts of `min_width`={alignment.min_width} "
            "channels, `layer_floor`, `expert_floor`, super experts). Prune less, or lower `align`, `min_width` or a "
            "floor."
        )
    channel_L = cover(
        scores.scores,
        weight_G=weight_L,
        budget=channel_budget(shape, prune_ratio=prune_ratio),
        floor_G=align * torch.tensor(least),
    )
    capacity_L = torch.tensor([whole_blocks(layer, align=align) for layer in shape.layers])
    return round_to_blocks(channel_L, capacity_L=capacity_L, num_blocks=num_blocks, align=align)


def expert_widths(
    layer: LayerShape, *, score_C: Tensor, phi_E: Tensor, floor_E: Tensor, num_blocks: int, alignment: Alignment
) -> Tensor:
    """Widths per expert, int64 [E]: coverage of each expert's channels times phi, weighted by sqrt(phi), then aligned.

    Paper A, algorithm 1 inside a layer. `phi_E` is not negative: the published code lets negative values through, which
    turns the order of such an expert's channels around.

    Raises:
        ValueError: no aligned widths fit the layer's budget.

    Examples:
        >>> layer = LayerShape(name="experts", widths=(4, 4), top_k=1)
        >>> score_C = torch.tensor([8.0, 1.0, 1.0, 0.0, 3.0, 3.0, 3.0, 1.0], dtype=torch.float64)
        >>> expert_widths(
        ...     layer,
        ...     score_C=score_C,
        ...     phi_E=torch.ones(2, dtype=torch.float64),
        ...     floor_E=torch.zeros(2, dtype=torch.int64),
        ...     num_blocks=4,
        ...     alignment=Alignment(align=1, min_width=1),
        ... ).tolist()  # 8 of 10 is the first channel's; 8 of 10 are three of 3
        [1, 3]
    """
    groups = [score * phi for score, phi in zip(score_C.split(layer.widths), phi_E, strict=True)]
    ideal_E = cover(groups, weight_G=phi_E.sqrt(), budget=num_blocks * alignment.align)
    value_E = torch.stack([group.sum() for group in groups])
    demand = Demand(ideal_E=ideal_E, value_E=value_E, floor_E=floor_E, num_blocks=num_blocks)
    return align_widths(layer, demand=demand, alignment=alignment)


def cover_model(
    scores: ChannelScores,
    *,
    weights: ExpertScores,
    weight_L: Tensor,
    prune_ratio: float,
    alignment: Alignment,
    floors: Floors | None = None,
) -> tuple[Tensor, ...]:
    """Masks by paper A's allocation; every expert keeps its best channels by the *channel* score.

    Args:
        scores: Channel scores.
        weights: Expert scores, phi.
        weight_L: Smoothed layer losses, float64 [L].
        prune_ratio: Share of channels to remove, in [0, 1); 0 keeps everything.
        alignment: How widths are rounded.
        floors: What layers and experts keep at least; a protected expert keeps `min_width`.

    Returns:
        Per layer bool [C], true for a channel that stays.

    Raises:
        ValueError: a setting out of range, or a layer that cannot be served: names it and the numbers.
    """
    check_prune_ratio(prune_ratio)
    if prune_ratio == 0:
        return keep_everything(scores.shape)
    floors = floors or Floors()
    block_L = layer_budgets(scores, weight_L=weight_L, prune_ratio=prune_ratio, alignment=alignment, floors=floors)
    floor = floors.expert_channels(scores.shape, least=alignment.min_width)
    keep = []
    for index, (layer, score_C) in enumerate(zip(scores.shape.layers, scores.scores, strict=True)):
        kept_E = expert_widths(
            layer,
            score_C=score_C,
            phi_E=weights.scores[index],
            floor_E=floor[index],
            num_blocks=int(block_L[index]),
            alignment=alignment,
        )
        keep.append(keep_top_channels(score_C, widths=layer.widths, kept_E=kept_E))
    return tuple(keep)
