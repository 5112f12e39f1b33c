"""The set of experts whose loss hurts the layer's output least (ExpertSparsity, without re-routing)."""

# E experts, P experts that have channels, S subsets, R experts of a subset, G router groups

import math
from collections.abc import Iterator, Sequence
from itertools import chain, combinations, islice

import numpy as np
import torch
from torch import Tensor

from lightning_moe.allocation.budget import check_prune_ratio, keep_everything
from lightning_moe.allocation.expert_dropping import check_enough, count_along, num_kept_experts
from lightning_moe.allocation.ranking import order_by
from lightning_moe.allocation.reachability import needed_per_group
from lightning_moe.records import LayerShape, ModelShape

MAX_SUBSETS = 100_000
_CHUNK = 16_384


def tries_all_subsets(layer: LayerShape, *, prune_ratio: float, max_subsets: int) -> bool:
    """Whether every set is tried: its experts are equally wide, so that all sets are of one size, and they are few.

    Raises:
        ValueError: a set is smaller than a token needs: names the layer and the numbers.

    Examples:
        >>> layer = LayerShape(name="experts", widths=(8,) * 8, top_k=2)
        >>> tries_all_subsets(layer, prune_ratio=0.5, max_subsets=70)  # 8 over 4
        True
    """
    present = [width for width in layer.widths if width]
    if len(set(present)) > 1:
        return False
    return math.comb(len(present), num_kept_experts(layer, prune_ratio=prune_ratio)) <= max_subsets


def drop_subsets(
    shape: ModelShape, *, grams: Sequence[Tensor], prune_ratio: float, max_subsets: int = MAX_SUBSETS
) -> tuple[Tensor, ...]:
    """Every layer keeps the `round((1 - prune_ratio) * E)` experts without whose rivals its output changes least.

    Removing the set D changes the routed sum of a token by `sum_{e in D} g_e z_e`, so with gates held the squared error
    summed over tokens is `sum_{i, j in D} G_ij`, where G is the Gram matrix of `g z`. All sets are tried where there
    are at most `max_subsets`; else experts go one by one, each time the one that adds least to the error.

    Where experts differ in width, as after a cut, they always go one by one, and as many stay as come nearest to that
    share of the layer's channels.

    Args:
        shape: The model.
        grams: Per layer `sum <g_i z_i, g_j z_j>`, float64 [E, E].
        prune_ratio: Share of experts to remove, in [0, 1); 0 keeps everything.
        max_subsets: Sets that are tried at most in a layer.

    Returns:
        Per layer bool [C], true for a channel that stays.

    Raises:
        ValueError: a ratio out of range, or fewer experts than a token needs: names the layer and the numbers.
    """
    check_prune_ratio(prune_ratio)
    if prune_ratio == 0:
        return keep_everything(shape)
    keep = []
    for layer, gram_EE in zip(shape.layers, grams, strict=True):
        width_E = torch.tensor(layer.widths)
        present_P = (width_E > 0).nonzero().squeeze(1)
        gram_PP, group_P = gram_EE[present_P][:, present_P], layer.group_of_expert[present_P]
        keep_E = torch.zeros(layer.num_experts, dtype=torch.bool)
        if tries_all_subsets(layer, prune_ratio=prune_ratio, max_subsets=max_subsets):
            num_kept = num_kept_experts(layer, prune_ratio=prune_ratio)
            keep_P = _best_subset(gram_PP, num_kept=num_kept, group_P=group_P, needed=needed_per_group(layer))
            keep_E[present_P] = keep_P
        else:
            order_P = _greedy_order(gram_PP, group_P=group_P, needed=needed_per_group(layer))
            num_kept = count_along(width_E[present_P][order_P], keep_ratio=1 - prune_ratio)
            check_enough(layer, num_kept=num_kept, prune_ratio=prune_ratio)
            keep_E[present_P[order_P[:num_kept]]] = True
        keep.append(keep_E.repeat_interleave(width_E))
    return tuple(keep)


def _best_subset(gram_PP: Tensor, *, num_kept: int, group_P: Tensor, needed: int) -> Tensor:
    """Tries every set: of those that stay or of those that go, whichever are smaller."""
    num_present = len(gram_PP)
    keeps = num_kept <= num_present - num_kept
    size = min(num_kept, num_present - num_kept)
    in_group_PG = (group_P[:, None] == group_P.unique()).long()
    row_P, best, best_R = gram_PP.sum(1), math.inf, torch.empty(0, dtype=torch.long)
    for subset_SR in _subsets(num_present, size=size):
        count_SG = in_group_PG[subset_SR].sum(1)
        kept_SG = count_SG if keeps else in_group_PG.sum(0) - count_SG
        error_S = gram_PP[subset_SR[:, :, None], subset_SR[:, None, :]].sum((1, 2))
        if keeps:  # of all experts without the subset: the whole sum, less its rows and columns, plus what went twice
            error_S = row_P.sum() - 2 * row_P[subset_SR].sum(1) + error_S
        error_S = error_S.masked_fill((kept_SG < needed).any(1), torch.inf)
        index = int(error_S.argmin())
        if float(error_S[index]) < best:
            best, best_R = float(error_S[index]), subset_SR[index]
    chosen_P = torch.zeros(num_present, dtype=torch.bool)
    chosen_P[best_R] = True
    return chosen_P if keeps else ~chosen_P


def _subsets(num_present: int, *, size: int) -> Iterator[Tensor]:
    """All sets of `size` of the first numbers, a few thousand at a time, int64 [S, R]."""
    every, total = combinations(range(num_present), size), math.comb(num_present, size)
    for start in range(0, total, _CHUNK):
        count = min(_CHUNK, total - start)
        flat = np.fromiter(chain.from_iterable(islice(every, count)), dtype=np.int64, count=count * size)
        yield torch.from_numpy(flat).view(count, size)


def _greedy_order(gram_PP: Tensor, *, group_P: Tensor, needed: int) -> Tensor:
    """Experts by when they go, the last first; a router group that has only what it needs drops none.

    Those that stay in any case come by what their loss would add, largest first.
    """
    kept_P, gone = torch.ones(len(gram_PP), dtype=torch.bool), list[int]()
    added_P = gram_PP.diagonal().clone()
    while True:
        left_G = torch.bincount(group_P[kept_P], minlength=int(group_P.max()) + 1)
        may_go_P = kept_P & (left_G[group_P] > needed)
        if not bool(may_go_P.any()):
            stay_R = kept_P.nonzero().squeeze(1)
            return torch.cat([stay_R[order_by(added_P[stay_R])], torch.tensor(gone[::-1], dtype=torch.long)])
        expert = int(added_P.masked_fill(~may_go_P, torch.inf).argmin())
        kept_P[expert] = False
        gone.append(expert)
        added_P += 2 * gram_PP[expert]
