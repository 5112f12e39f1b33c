"""Experts that must stay so that every token still finds `top_k` of them."""

# E experts

import torch
from torch import Tensor

from lightning_moe.allocation.ranking import order_by
from lightning_moe.records import LayerShape


def needed_per_group(layer: LayerShape) -> int:
    """Experts that each router group keeps at least.

    `top_k` without groups. With groups `ceil(top_k / top_k_groups)`, so that any choice of groups holds `top_k`
    experts, and two where the group has them, because such routers rank a group by the sum of its two best.

    Examples:
        >>> needed_per_group(LayerShape(name="experts", widths=(8,) * 8, top_k=3))
        3
        >>> needed_per_group(LayerShape(name="experts", widths=(8,) * 8, top_k=4, num_groups=4, top_k_groups=2))
        2
    """
    needed = -(-layer.top_k // layer.top_k_groups)
    if layer.num_groups == 1:
        return needed
    return max(needed, min(2, layer.num_experts // layer.num_groups))


def reserve_experts(layer: LayerShape, *, preferences: tuple[Tensor, ...], available_E: Tensor) -> Tensor:
    """The preferred experts that reachability asks for, in each router group.

    Args:
        layer: The layer.
        preferences: Keys [E]: the higher the first key, the sooner an expert is reserved; the next ones break ties.
        available_E: Bool [E], experts that may be reserved.

    Returns:
        Bool [E].

    Raises:
        ValueError: a group has fewer available experts than it must keep.
    """
    needed = needed_per_group(layer)
    reserved_E = torch.zeros(layer.num_experts, dtype=torch.bool)
    group_E = layer.group_of_expert
    order_E = order_by(*preferences)
    for group in range(layer.num_groups):
        candidates = order_E[(available_E & (group_E == group))[order_E]]
        if len(candidates) < needed:
            raise ValueError(
                f"{layer.name}: {needed} experts of router group {group} must keep a block of channels, only "
                f"{len(candidates)} have one. Choose a smaller `align`, at most the widths {sorted(set(layer.widths))}."
            )
        reserved_E[candidates[:needed]] = True
    return reserved_E
