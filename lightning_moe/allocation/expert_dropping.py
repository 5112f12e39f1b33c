"""Whole experts go, the same share in every layer: the baseline of REAP and its relatives."""

# C channels of a layer, E experts, P experts that have channels

import torch
from torch import Tensor

from lightning_moe.allocation.budget import check_prune_ratio, keep_everything
from lightning_moe.allocation.ranking import order_by
from lightning_moe.allocation.reachability import reserve_experts
from lightning_moe.records import ExpertScores, LayerShape


def drop_experts(scores: ExpertScores, *, prune_ratio: float) -> tuple[Tensor, ...]:
    """Every layer keeps its `round((1 - prune_ratio) * E)` best experts whole.

    Where experts differ in width, as after a cut, it keeps as many of the best as come nearest to that share of the
    layer's channels. Experts that a router with groups needs in each group come first, then the best of all others.

    Args:
        scores: Expert scores; only their order inside a layer counts.
        prune_ratio: Share of experts to remove, in [0, 1); 0 keeps everything.

    Returns:
        Per layer bool [C], true for a channel that stays.

    Raises:
        ValueError: a ratio out of range, or fewer experts than a token needs: names the layer and the numbers.
    """
    check_prune_ratio(prune_ratio)
    if prune_ratio == 0:
        return keep_everything(scores.shape)
    return tuple(
        _keep_best(layer, score_E=score_E, prune_ratio=prune_ratio)
        for layer, score_E in zip(scores.shape.layers, scores.scores, strict=True)
    )


def _keep_best(layer: LayerShape, *, score_E: Tensor, prune_ratio: float) -> Tensor:
    width_E = torch.tensor(layer.widths)
    num_present = int((width_E > 0).sum())
    reserved_E = reserve_experts(layer, preferences=(score_E,), available_E=width_E > 0)
    order_E = order_by(reserved_E.long(), (width_E > 0).long(), score_E)
    num_kept = _num_kept(width_E[order_E][:num_present], keep_ratio=1 - prune_ratio)
    if num_kept < int(reserved_E.sum()):
        raise ValueError(
            f"{layer.name}: `prune_ratio`={prune_ratio} keeps {num_kept} of {num_present} experts, but "
            f"{int(reserved_E.sum())} must stay (top_k={layer.top_k}, num_groups={layer.num_groups}). Prune less."
        )
    keep_E = torch.zeros_like(reserved_E)
    keep_E[order_E[:num_kept]] = True
    return keep_E.repeat_interleave(width_E)


def _num_kept(width_P: Tensor, *, keep_ratio: float) -> int:
    """How many of the first experts stay; `width_P` are their widths, best first."""
    if len(width_P.unique()) == 1:
        return round(keep_ratio * len(width_P))
    return int((width_P.cumsum(0) - keep_ratio * width_P.sum()).abs().argmin()) + 1
