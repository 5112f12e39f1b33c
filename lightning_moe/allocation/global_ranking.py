"""Our default: one ranking of all blocks of channels of the whole model (method, 4b)."""

# C channels of a layer, E experts, B blocks of a layer (experts in order, best block of an expert first),
# N channels of the widest expert, M blocks of the widest expert

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_moe.allocation.budget import block_budget, check_prune_ratio, keep_everything
from lightning_moe.allocation.floors import Floors
from lightning_moe.allocation.ranking import as_rectangle, keep_top_channels, order_by
from lightning_moe.allocation.reachability import reserve_experts
from lightning_moe.records import ChannelScores, LayerShape, ModelShape

# In place of a cost of zero: a score over it is finite for every score below 1e+8 and above all others.
_FREE = 1e-300


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerBlocks:
    """Blocks of one layer: summed score [B], expert [B], place in the expert's own ranking [B]."""

    score_B: Tensor
    expert_B: Tensor
    rank_B: Tensor


def layer_blocks(score_C: Tensor, *, widths: Sequence[int], align: int) -> LayerBlocks:
    """Cuts each expert's own ranking, best channel first, into whole blocks of `align`; the partial rest is left out.

    The score of a block is the sum of its channels'; inside an expert it never rises from block to block.

    Examples:
        >>> score_C = torch.tensor([1.0, 5.0, 2.0, 4.0, 3.0, 3.0])
        >>> blocks = layer_blocks(score_C, widths=[4, 2], align=2)
        >>> blocks.score_B.tolist(), blocks.expert_B.tolist()  # 5 + 4, 2 + 1; 3 + 3
        ([9.0, 3.0, 6.0], [0, 0, 1])
    """
    score_EN, _ = as_rectangle(score_C, widths=widths)
    num_columns = score_EN.shape[1] // align
    best_EN = score_EN.sort(dim=1, descending=True).values[:, : num_columns * align]
    score_EM = best_EN.reshape(len(widths), num_columns, align).sum(2)
    whole_EM = torch.arange(num_columns) < (torch.tensor(widths) // align)[:, None]
    expert_B, rank_B = whole_EM.nonzero(as_tuple=True)
    return LayerBlocks(score_B=score_EM[whole_EM], expert_B=expert_B, rank_B=rank_B)


def rank_globally(
    scores: ChannelScores,
    *,
    prune_ratio: float,
    align: int = 16,
    floors: Floors | None = None,
    costs: Sequence[Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """Keeps the best blocks of the model: exactly `floor(round((1 - prune_ratio) * num_channels) / align)` of them.

    Source: method, 4b. The score must mean the same in every layer, as `channel_ablation` does. First come the blocks
    that floors and reachability reserve, then the best of all others; no weights and no search are involved.

    Args:
        scores: Channel scores.
        prune_ratio: Share of channels to remove, in [0, 1); 0 keeps everything.
        align: Channels of a block.
        floors: What layers and experts keep at least; a protected expert keeps one block.
        costs: Per layer, what a channel of each expert costs [E] (`usage_costs`): blocks are ranked by score over
            cost. Without them every channel costs the same. How many stay is decided by `prune_ratio` either way.

    Returns:
        Per layer bool [C], true for a channel that stays.

    Raises:
        ValueError: a setting out of range, or a budget smaller than what is reserved: names the layer and the numbers.
    """
    check_prune_ratio(prune_ratio)
    if prune_ratio == 0:
        return keep_everything(scores.shape)
    num_blocks = block_budget(scores.shape, prune_ratio=prune_ratio, align=align)
    return rank_blocks(scores, num_blocks=num_blocks, align=align, floors=floors, costs=costs)


def rank_blocks(
    scores: ChannelScores,
    *,
    num_blocks: int,
    align: int,
    floors: Floors | None = None,
    costs: Sequence[Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """`rank_globally` for a budget in blocks, at most as many as the experts have.

    Raises:
        ValueError: a budget smaller than what is reserved, or a router group of experts without whole blocks.
    """
    layers = list(zip(scores.shape.layers, scores.scores, strict=True))
    blocks = [layer_blocks(score_C, widths=layer.widths, align=align) for layer, score_C in layers]
    if costs is not None:
        blocks = [_per_cost(own, cost_E=cost_E) for own, cost_E in zip(blocks, costs, strict=True)]
    reserved = _reserve_all(scores.shape, blocks=blocks, floors=floors or Floors(), align=align)
    _check_reserved(scores.shape, reserved=reserved, num_blocks=num_blocks, align=align)
    kept = [
        align * torch.bincount(own.expert_B[chosen_B], minlength=layer.num_experts)
        for (layer, _), own, chosen_B in zip(
            layers, blocks, _choose(blocks, reserved=reserved, num_blocks=num_blocks), strict=True
        )
    ]
    return tuple(
        keep_top_channels(score_C, widths=layer.widths, kept_E=kept_E)
        for (layer, score_C), kept_E in zip(layers, kept, strict=True)
    )


def _per_cost(blocks: LayerBlocks, *, cost_E: Tensor) -> LayerBlocks:
    """Score over cost; what costs nothing comes first if it is worth anything, and last if it is not."""
    cost_B = cost_E[blocks.expert_B].clamp(min=_FREE)
    return replace(blocks, score_B=blocks.score_B / cost_B)


def _reserve_all(shape: ModelShape, *, blocks: Sequence[LayerBlocks], floors: Floors, align: int) -> list[Tensor]:
    expert_floors = floors.expert_channels(shape, least=align)
    layer_floors = floors.layer_blocks(shape, align=align)
    return [
        _reserve(own, layer=layer, floor_E=(floor_E + align - 1) // align, layer_floor=layer_floor)
        for own, layer, floor_E, layer_floor in zip(blocks, shape.layers, expert_floors, layer_floors, strict=True)
    ]


def _reserve(blocks: LayerBlocks, *, layer: LayerShape, floor_E: Tensor, layer_floor: int) -> Tensor:
    best_E = torch.full((layer.num_experts,), -1.0, dtype=torch.float64)
    first_B = blocks.rank_B == 0
    best_E[blocks.expert_B[first_B]] = blocks.score_B[first_B]
    reachable_E = reserve_experts(layer, preferences=(best_E,), available_E=best_E >= 0)
    reserved_B = blocks.rank_B < torch.maximum(floor_E, reachable_E.long())[blocks.expert_B]
    lacking = layer_floor - int(reserved_B.sum())
    if lacking > 0:
        reserved_B[order_by((~reserved_B).long(), blocks.score_B)[:lacking]] = True
    return reserved_B


def _check_reserved(shape: ModelShape, *, reserved: Sequence[Tensor], num_blocks: int, align: int) -> None:
    demands = [int(reserved_B.sum()) for reserved_B in reserved]
    if sum(demands) > num_blocks:
        layer = shape.layers[demands.index(max(demands))]
        raise ValueError(
            f"The budget is {num_blocks} blocks of `align`={align} channels, but {sum(demands)} are reserved; "
            f"{layer.name} alone reserves {max(demands)} (top_k={layer.top_k} experts of one block, `layer_floor`, "
            "`expert_floor`, super experts). Prune less, or lower `align` or a floor."
        )


def _choose(blocks: Sequence[LayerBlocks], *, reserved: Sequence[Tensor], num_blocks: int) -> tuple[Tensor, ...]:
    reserved_all = torch.cat(list(reserved))
    order = order_by(reserved_all.long(), torch.cat([own.score_B for own in blocks]))
    chosen = torch.zeros_like(reserved_all)
    chosen[order[:num_blocks]] = True
    return chosen.split([len(own.score_B) for own in blocks])
