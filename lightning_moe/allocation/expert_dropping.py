"""Whole experts go by their score: the same share in every layer, or the worst of the whole model."""

# C channels of a layer, E experts, P experts that have channels

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_moe.allocation.budget import check_prune_ratio, keep_everything
from lightning_moe.allocation.ranking import order_by
from lightning_moe.allocation.reachability import needed_per_group, reserve_experts
from lightning_moe.records import ExpertScores, LayerShape


def drop_experts(
    scores: ExpertScores, *, prune_ratio: float, protected: Sequence[Tensor] | None = None
) -> tuple[Tensor, ...]:
    """Every layer keeps its `round((1 - prune_ratio) * E)` best experts whole.

    Where experts differ in width, as after a cut, it keeps as many of the best as come nearest to that share of the
    layer's channels. Experts that a router with groups needs in each group come first, then the protected ones, then
    the best of all others.

    Args:
        scores: Expert scores; only their order inside a layer counts.
        prune_ratio: Share of experts to remove, in [0, 1); 0 keeps everything.
        protected: Per layer int64 [E], 0 for an expert that is not protected; the higher, the sooner it is kept.

    Returns:
        Per layer bool [C], true for a channel that stays.

    Raises:
        ValueError: a ratio out of range, or fewer experts than a token needs: names the layer and the numbers.

    Examples:
        >>> score_E = torch.tensor([1.0, 4.0, 3.0, 2.0], dtype=torch.float64)
        >>> scores = ExpertScores(shape=shape_of([2, 2, 2, 2]), criterion="reap", scores=(score_E,))
        >>> drop_experts(scores, prune_ratio=0.5)[0].int().tolist()
        [0, 0, 1, 1, 1, 1, 0, 0]
    """
    check_prune_ratio(prune_ratio)
    if prune_ratio == 0:
        return keep_everything(scores.shape)
    protected = protected or [torch.zeros(layer.num_experts, dtype=torch.long) for layer in scores.shape.layers]
    return tuple(
        _keep_best(layer, preferences=(protected_E, score_E), prune_ratio=prune_ratio)
        for layer, score_E, protected_E in zip(scores.shape.layers, scores.scores, protected, strict=True)
    )


def drop_experts_globally(scores: ExpertScores, *, prune_ratio: float) -> tuple[Tensor, ...]:
    """The model keeps its `round((1 - prune_ratio) * experts)` best experts, whichever layers they are in.

    Each layer first keeps the experts that reachability asks for (top-k, router groups), its own best. Where experts
    differ in width, as many of the best stay as come nearest to that share of the model's channels.

    Args:
        scores: Expert scores that mean the same in every layer.
        prune_ratio: Share of experts to remove, in [0, 1); 0 keeps everything.

    Returns:
        Per layer bool [C], true for a channel that stays.

    Raises:
        ValueError: a ratio out of range, or fewer experts than the layers need: names one of them and the numbers.
    """
    check_prune_ratio(prune_ratio)
    if prune_ratio == 0:
        return keep_everything(scores.shape)
    layers = scores.shape.layers
    width_E = torch.tensor([width for layer in layers for width in layer.widths])
    reserved = [
        reserve_experts(layer, preferences=(score_E,), available_E=torch.tensor(layer.widths) > 0)
        for layer, score_E in zip(layers, scores.scores, strict=True)
    ]
    keys = (torch.cat(reserved).long(), (width_E > 0).long(), torch.cat(scores.scores))
    order_E = order_by(*keys)
    num_present, num_reserved = int((width_E > 0).sum()), int(keys[0].sum())
    num_kept = count_along(width_E[order_E][:num_present], keep_ratio=1 - prune_ratio)
    if num_kept < num_reserved:
        demands = [int(own_E.sum()) for own_E in reserved]
        layer = layers[demands.index(max(demands))]
        raise ValueError(
            f"`prune_ratio`={prune_ratio} keeps {num_kept} of the model's {num_present} experts, but {num_reserved} "
            f"must stay; {layer.name} alone needs {max(demands)} (top_k={layer.top_k}, num_groups={layer.num_groups}). "
            "Prune less."
        )
    keep_E = torch.zeros(len(width_E), dtype=torch.bool)
    keep_E[order_E[:num_kept]] = True
    return keep_E.repeat_interleave(width_E).split([layer.num_channels for layer in layers])


def num_kept_experts(layer: LayerShape, *, prune_ratio: float) -> int:
    """`round((1 - prune_ratio) * E)` of the experts that have channels.

    Raises:
        ValueError: that is fewer than a token needs: names the layer and the numbers.
    """
    num_present = sum(width > 0 for width in layer.widths)
    num_kept = round((1 - prune_ratio) * num_present)
    check_enough(layer, num_kept=num_kept, prune_ratio=prune_ratio)
    return num_kept


def _keep_best(layer: LayerShape, *, preferences: tuple[Tensor, ...], prune_ratio: float) -> Tensor:
    width_E = torch.tensor(layer.widths)
    num_present = int((width_E > 0).sum())
    reserved_E = reserve_experts(layer, preferences=preferences, available_E=width_E > 0)
    order_E = order_by(reserved_E.long(), (width_E > 0).long(), *preferences)
    num_kept = count_along(width_E[order_E][:num_present], keep_ratio=1 - prune_ratio)
    check_enough(layer, num_kept=num_kept, prune_ratio=prune_ratio)
    keep_E = torch.zeros_like(reserved_E)
    keep_E[order_E[:num_kept]] = True
    return keep_E.repeat_interleave(width_E)


def check_enough(layer: LayerShape, *, num_kept: int, prune_ratio: float) -> None:
    """Refuses to keep fewer experts than a token needs.

    Raises:
        ValueError: names the layer and the numbers.
    """
    num_needed = needed_per_group(layer) * layer.num_groups
    if num_kept < num_needed:
        num_present = sum(width > 0 for width in layer.widths)
        raise ValueError(
            f"{layer.name}: `prune_ratio`={prune_ratio} keeps {num_kept} of {num_present} experts, but "
            f"{num_needed} must stay (top_k={layer.top_k}, num_groups={layer.num_groups}). Prune less."
        )


def count_along(width_P: Tensor, *, keep_ratio: float) -> int:
    """How many of the first experts come nearest to a share of all channels; `width_P` are their widths, best first."""
    if len(width_P.unique()) == 1:
        return round(keep_ratio * len(width_P))
    return int((width_P.cumsum(0) - keep_ratio * width_P.sum()).abs().argmin()) + 1
