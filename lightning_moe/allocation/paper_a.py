"""Paper A from statistics to masks: coverage across layers, coverage inside a layer, alignment."""

# L layers, C channels of a layer, E experts

import torch
from torch import Tensor

from lightning_moe.allocation.alignment import Alignment, Demand, align_widths
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


def layer_budgets(scores: ChannelScores, *, weight_L: Tensor, prune_ratio: float, align: int, floors: Floors) -> Tensor:
    """Blocks per layer, int64 [L]: coverage of the layers' pooled channels, weighted by their smoothed loss.

    Paper A, algorithm 1 across layers; the counts are exact in channels first, then in whole blocks.

    Raises:
        ValueError: a budget that the experts or the floors cannot meet.
    """
    shape = scores.shape
    num_blocks = block_budget(shape, prune_ratio=prune_ratio, align=align)
    channel_L = cover(
        scores.scores,
        weight_G=weight_L,
        budget=channel_budget(shape, prune_ratio=prune_ratio),
        floor_G=align * torch.tensor(floors.layer_blocks(shape, align=align)),
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
    block_L = layer_budgets(scores, weight_L=weight_L, prune_ratio=prune_ratio, align=alignment.align, floors=floors)
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
