"""Orders: of channels inside their expert, of anything by several keys."""

# C channels of a layer, E experts, N channels of the widest expert

from collections.abc import Sequence

import torch
from torch import Tensor


def order_by(*keys: Tensor) -> Tensor:
    """Indices sorted descending by the first key, equals by the second, and so on; last of all by index.

    Examples:
        >>> order_by(torch.tensor([2, 1, 2]), torch.tensor([0, 5, 1])).tolist()
        [2, 0, 1]
    """
    order = torch.arange(len(keys[0]))
    for key in reversed(keys):
        order = order[key[order].argsort(descending=True, stable=True)]
    return order


def as_rectangle(score_C: Tensor, *, widths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """One row per expert: scores, -1 beyond an expert's width, float64 [E, N]; and where channels are, bool [E, N]."""
    inside_EN = torch.arange(max(widths)) < torch.tensor(widths)[:, None]
    score_EN = torch.full(inside_EN.shape, -1.0, dtype=score_C.dtype).masked_scatter(inside_EN, score_C)
    return score_EN, inside_EN


def rank_within_experts(score_C: Tensor, *, widths: Sequence[int]) -> Tensor:
    """Place of each channel in its own expert, 0 = best score, equals by index; int64 [C]. Scores are nonnegative."""
    score_EN, inside_EN = as_rectangle(score_C, widths=widths)
    order_EN = score_EN.argsort(dim=1, descending=True, stable=True)
    place_EN = torch.arange(score_EN.shape[1]).expand_as(order_EN)
    return torch.empty_like(order_EN).scatter_(1, order_EN, place_EN)[inside_EN]


def keep_top_channels(score_C: Tensor, *, widths: Sequence[int], kept_E: Tensor) -> Tensor:
    """True for the `kept_E` best channels of each expert.

    Args:
        score_C: Channel scores, nonnegative, float64 [C].
        widths: Channels of each expert, E numbers.
        kept_E: How many of them stay, int64 [E].

    Returns:
        Bool [C].

    Examples:
        >>> score_C = torch.tensor([1.0, 5.0, 2.0, 9.0, 8.0])
        >>> keep_top_channels(score_C, widths=[3, 2], kept_E=torch.tensor([2, 1])).int().tolist()
        [0, 1, 1, 1, 0]
    """
    return rank_within_experts(score_C, widths=widths) < kept_E.repeat_interleave(torch.tensor(widths))
