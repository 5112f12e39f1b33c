"""One block budget spread over the layers by weights, then a ranking inside each layer."""

# L layers, C channels of a layer

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_moe.allocation.budget import (
    block_budget,
    check_prune_ratio,
    keep_everything,
    round_to_blocks,
    whole_blocks,
)
from lightning_moe.allocation.global_ranking import rank_blocks
from lightning_moe.allocation.reachability import needed_per_group
from lightning_moe.records import ChannelScores, ModelShape

_DOUBLINGS, _HALVINGS = 64, 100
_PARTS = 2**20


def u_shape(num_layers: int, *, strength: float) -> Tensor:
    """Weights that are highest at the first and the last layer: `1 + strength * (x^2 - mean x^2)`, float64 [L].

    x runs from -1 at the first layer to 1 at the last; the mean is 1. With many layers the ends weigh
    `1 + 2/3 strength` and the middle `1 - 1/3 strength`; 0 is uniform. The field's folklore (ends are often left
    unpruned, as in LLM-Pruner, arXiv 2305.11627); this formula is ours.

    Examples:
        >>> [round(weight, 3) for weight in u_shape(3, strength=0.3).tolist()]  # x^2 is 1, 0, 1 and 2/3 in the mean
        [1.1, 0.8, 1.1]
    """
    square_L = torch.linspace(-1.0, 1.0, num_layers, dtype=torch.float64).square()
    return 1 + strength * (square_L - square_L.mean())


def spread_blocks(shape: ModelShape, *, weight_L: Tensor, prune_ratio: float, align: int) -> Tensor:
    """Blocks per layer, int64 [L]: shares of the layers' blocks in proportion to the weights, within what is possible.

    `share_l = clamp(c * weight_l, least, 1)` of the layer's whole blocks, with the c that meets the budget, found by
    bisection; rounded by largest remainder, so that the sum is exact. A layer keeps at least one block for each expert
    that reachability asks for, and at most all of its blocks.

    Raises:
        ValueError: a ratio or `align` out of range, or a budget below what the layers need: names one of them.
    """
    num_blocks = block_budget(shape, prune_ratio=prune_ratio, align=align)
    capacity_L = torch.tensor([whole_blocks(layer, align=align) for layer in shape.layers])
    least_L = torch.tensor([needed_per_group(layer) * layer.num_groups for layer in shape.layers])
    least_L = torch.minimum(least_L, capacity_L)
    if int(least_L.sum()) > num_blocks:
        index = int(least_L.argmax())
        raise ValueError(
            f"The budget is {num_blocks} blocks of `align`={align} channels, but the layers need {int(least_L.sum())} "
            f"so that each token finds its experts; {shape.layers[index].name} alone needs {int(least_L[index])} "
            f"(top_k={shape.layers[index].top_k}). Prune less, or lower `align`."
        )

    def spread(factor: float) -> Tensor:
        return torch.clamp(factor * weight_L * capacity_L, min=least_L.double(), max=capacity_L.double())

    block_L = spread(_find_factor(lambda factor: float(spread(factor).sum()), target=num_blocks))
    # Whole numbers for the rounding, in which the error of the bisection is gone.
    part_L = (block_L * _PARTS).round().long()
    return round_to_blocks(part_L, capacity_L=capacity_L, num_blocks=num_blocks, align=_PARTS)


def _find_factor(total: Callable[[float], float], *, target: float) -> float:
    """The largest factor whose total stays at or below the target; `total` never falls."""
    low, high = 0.0, 1.0
    for _ in range(_DOUBLINGS):
        if total(high) > target:
            break
        low, high = high, 2 * high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if total(middle) <= target else (low, middle)
    return low


def rank_in_layers(
    scores: ChannelScores, *, weight_L: Tensor, prune_ratio: float, align: int = 16
) -> tuple[Tensor, ...]:
    """Keeps the best blocks of each layer, all its experts in one ranking, within the layer's share of the budget.

    Args:
        scores: Channel scores, comparable inside a layer.
        weight_L: What the layers' shares are proportional to, not negative, float64 [L].
        prune_ratio: Share of channels to remove, in [0, 1); 0 keeps everything.
        align: Channels of a block.

    Returns:
        Per layer bool [C], true for a channel that stays; exactly the model's budget in blocks.

    Raises:
        ValueError: a setting out of range, or a budget below what the layers need: names one of them.
    """
    check_prune_ratio(prune_ratio)
    if prune_ratio == 0:
        return keep_everything(scores.shape)
    block_L = spread_blocks(scores.shape, weight_L=weight_L, prune_ratio=prune_ratio, align=align)
    layers = _single_layers(scores)
    return tuple(
        rank_blocks(layer, num_blocks=int(blocks), align=align)[0]
        for layer, blocks in zip(layers, block_L, strict=True)
    )


def _single_layers(scores: ChannelScores) -> Sequence[ChannelScores]:
    return [
        ChannelScores(shape=replace(scores.shape, layers=(layer,)), criterion=scores.criterion, scores=(score_C,))
        for layer, score_C in zip(scores.shape.layers, scores.scores, strict=True)
    ]
