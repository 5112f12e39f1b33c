"""Alignment-aware redistribution: hardware-friendly widths within a layer's own budget (paper A, AAR; method, 3)."""

# E experts; widths, ideals and floors are channels, blocks are `align` channels

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_moe.allocation.budget import check_count
from lightning_moe.allocation.ranking import order_by
from lightning_moe.allocation.reachability import needed_per_group, reserve_experts
from lightning_moe.records import LayerShape


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """How widths are rounded.

    Args:
        align: Channels of a block.
        min_width: Smallest width of an expert that stays, in channels, rounded up to blocks.

    Raises:
        ValueError: a setting is out of range.
    """

    align: int = 16
    min_width: int = 16

    def __post_init__(self) -> None:
        check_count(self.align, name="align", lowest=1)
        check_count(self.min_width, name="min_width", lowest=1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Demand:
    """What one layer asks for.

    Args:
        ideal_E: Channels per expert before alignment, int64 [E].
        value_E: What breaks ties between equal counts (an expert's summed score), float64 [E].
        floor_E: Channels of protected experts at least, int64 [E]; 0 = not protected.
        num_blocks: The layer's budget.
    """

    ideal_E: Tensor
    value_E: Tensor
    floor_E: Tensor
    num_blocks: int


def align_widths(layer: LayerShape, *, demand: Demand, alignment: Alignment) -> Tensor:
    """Widths that are 0 or at least `min_width`, multiples of `align`, and sum to exactly the layer's budget.

    1. An expert below `min_width` is evicted, unless it is protected or needed for reachability; 2. the others are
    floored to whole blocks; 3. the freed blocks go to the experts that lost the most channels, one each, then to those
    with the most room. Where the survivors cannot hold the budget, evicted experts return, largest first; where
    protected ones overdraw it, blocks are taken from the experts that lose least by it. An expert that has fewer
    channels than `min_width` to begin with may stay with all of its whole blocks.

    Args:
        layer: The layer.
        demand: Ideal widths, ties, floors, budget.
        alignment: Size of a block and smallest width.

    Returns:
        Widths, int64 [E].

    Raises:
        ValueError: no such widths exist; the message names the layer and the numbers.

    Examples:
        >>> layer = LayerShape(name="experts", widths=(64, 64, 64), top_k=1)
        >>> ideal_E = torch.tensor([40, 20, 4])  # 4 is below a block: evicted; 40 and 20 become 2 and 1 blocks
        >>> none_E, value_E = torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.float64)
        >>> demand = Demand(ideal_E=ideal_E, value_E=value_E, floor_E=none_E, num_blocks=4)
        >>> align_widths(layer, demand=demand, alignment=Alignment(align=16)).tolist()  # 40 lost 8, 20 lost 4
        [48, 16, 0]
    """
    align = alignment.align
    capacity_E, least_E = _capacities(layer, floor_E=demand.floor_E, alignment=alignment)
    alive_E = _survivors(layer, demand=demand, capacity_E=capacity_E, least_E=least_E, align=align)
    capacity_E, least_E = capacity_E * alive_E, least_E * alive_E
    block_E = torch.clamp(demand.ideal_E // align, min=least_E, max=capacity_E)
    block_E = _return_blocks(block_E, demand=demand, capacity_E=capacity_E, align=align)
    return align * _take_blocks(block_E, demand=demand, least_E=least_E, align=align)


def fewest_blocks(layer: LayerShape, *, floor_E: Tensor, alignment: Alignment) -> int:
    """Blocks without which no legal widths exist: of protected experts, and of the narrowest others that must stay.

    Args:
        layer: The layer.
        floor_E: Channels of protected experts at least, int64 [E]; 0 = not protected.
        alignment: Size of a block and smallest width.
    """
    capacity_E, least_E = _capacities(layer, floor_E=floor_E, alignment=alignment)
    protected_E, group_E, count = floor_E > 0, layer.group_of_expert, int(least_E[floor_E > 0].sum())
    for group in range(layer.num_groups):
        own_E = (group_E == group) & (capacity_E > 0)
        others = least_E[own_E & ~protected_E].sort().values
        count += int(others[: max(needed_per_group(layer) - int((own_E & protected_E).sum()), 0)].sum())
    return count


def _capacities(layer: LayerShape, *, floor_E: Tensor, alignment: Alignment) -> tuple[Tensor, Tensor]:
    """Whole blocks that each expert has, and that it keeps at least if it stays; int64 [E]."""
    align = alignment.align
    capacity_E = torch.tensor(layer.widths) // align
    return capacity_E, torch.minimum((floor_E.clamp(min=alignment.min_width) + align - 1) // align, capacity_E)


def _survivors(layer: LayerShape, *, demand: Demand, capacity_E: Tensor, least_E: Tensor, align: int) -> Tensor:
    """Experts that stay: as many of the best, needed ones first, as can hold the budget and be paid by it."""
    preferences, present_E = (demand.ideal_E, demand.value_E), capacity_E > 0
    needed_E = reserve_experts(layer, preferences=preferences, available_E=present_E)
    needed_E = needed_E | ((demand.floor_E > 0) & present_E)
    wide_E = needed_E | ((demand.ideal_E >= least_E * align) & present_E)
    order_E = order_by(needed_E.long(), present_E.long(), *preferences)
    most = int((least_E[order_E].cumsum(0) <= demand.num_blocks).sum())
    fewest = max(int(needed_E.sum()), int((capacity_E[order_E].cumsum(0) < demand.num_blocks).sum()) + 1)
    if fewest > most:
        raise ValueError(
            f"{layer.name}: the layer's budget of {demand.num_blocks} blocks of `align`={align} channels does not fit: "
            f"{int(needed_E.sum())} experts must stay (top_k={layer.top_k}, router groups, protected ones) and need "
            f"{int(least_E[needed_E].sum())} blocks, all {layer.num_experts} experts hold {int(capacity_E.sum())}. "
            "Prune less, lower `min_width` or `align`, or set `layer_floor`."
        )
    alive_E = torch.zeros_like(needed_E)
    alive_E[order_E[: min(max(int(wide_E.sum()), fewest), most)]] = True
    return alive_E


def _return_blocks(block_E: Tensor, *, demand: Demand, capacity_E: Tensor, align: int) -> Tensor:
    """Hands out what the budget still has: largest loss first, one block each, then most room first."""
    block_E = block_E.clone()
    missing = demand.num_blocks - int(block_E.sum())
    loss_E, room_E = demand.ideal_E - block_E * align, capacity_E - block_E
    open_E = (room_E > 0) & (loss_E > 0)
    first = min(int(open_E.sum()), max(missing, 0))
    block_E[order_by(open_E.long(), loss_E, room_E, demand.value_E)[:first]] += 1
    for _ in range(missing - first):
        block_E[order_by(capacity_E - block_E, demand.value_E)[0]] += 1
    return block_E


def _take_blocks(block_E: Tensor, *, demand: Demand, least_E: Tensor, align: int) -> Tensor:
    """Takes back what is over the budget, each block where most was given beyond the ideal."""
    block_E = block_E.clone()
    for _ in range(int(block_E.sum()) - demand.num_blocks):
        surplus_E = block_E * align - demand.ideal_E
        block_E[order_by((block_E > least_E).long(), surplus_E, -demand.value_E)[0]] -= 1
    return block_E
