"""Coverage-maximised counts under an exact budget (paper A, algorithm 1)."""

# G groups (layers, or experts of a layer), N channels of the largest group, W repair window

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

MAX_ITERATIONS = 50


@dataclass(frozen=True, kw_only=True, eq=False)
class SortedGroups:
    """Scores of every group, best first, and their prefix sums, as rectangles.

    Args:
        score_GN: Scores descending, 0 beyond the end of a group.
        prefix_GN: `S_g(n + 1)`, infinite beyond the end of a group.
        size_G: Channels of each group.
        total_G: `S_tot` of each group.
    """

    score_GN: Tensor
    prefix_GN: Tensor
    size_G: Tensor
    total_G: Tensor

    @classmethod
    def of(cls, groups: Sequence[Tensor]) -> Self:
        """Sorts nonnegative scores, one tensor per group."""
        size_G = torch.tensor([len(group) for group in groups])
        score_GN = pad_sequence([group.sort(descending=True).values for group in groups], batch_first=True)
        total_GN = score_GN.cumsum(1)
        beyond_GN = torch.arange(score_GN.shape[1]) >= size_G[:, None]
        last_G1 = (size_G - 1).clamp(min=0)[:, None]
        return cls(
            score_GN=score_GN,
            prefix_GN=total_GN.masked_fill(beyond_GN, torch.inf),
            size_G=size_G,
            total_G=total_GN.gather(1, last_G1).squeeze(1),
        )

    def covering_counts(self, coverage_G: Tensor) -> Tensor:
        """`N_g = min{n : S_g(n) >= rho_g * S_tot}`, int64 [G], for target coverages rho in [0, 1]."""
        target_G = coverage_G * self.total_G
        count_G = torch.searchsorted(self.prefix_GN, target_G[:, None]).squeeze(1) + 1
        return count_G.where(target_G > 0, 0)


def cover(groups: Sequence[Tensor], *, weight_G: Tensor, budget: int, floor_G: Tensor | None = None) -> Tensor:
    """Counts per group that reach the same weighted coverage and sum to the budget.

    Paper A, algorithm 1: `rho_g = min(1, m * w_g)`, `N_g = min{n : S_g(n) >= rho_g * S_tot}`; the scalar m is found by
    bisection, all groups at once by binary search in their prefix sums. Departures: the published search caps m at 1
    and stops at a tolerance; here the bracket doubles until it holds the budget, and the counts just below the budget
    are repaired by the largest marginal scores until it is met exactly. At most 50 iterations, as published.

    Args:
        groups: Nonnegative scores of each group's channels, float64.
        weight_G: Weights, float64 [G], not negative; when all are 0 they count as equal.
        budget: Channels to keep over all groups.
        floor_G: Channels that each group keeps at least, int64 [G].

    Returns:
        Channels to keep per group, int64 [G].

    Raises:
        ValueError: a weight is negative or not finite, or the budget is below the floors or above all channels.

    Examples:
        >>> groups = [torch.tensor([6.0, 3.0, 1.0], dtype=torch.float64), torch.tensor([5.0, 5.0], dtype=torch.float64)]
        >>> weight_G = torch.ones(2, dtype=torch.float64)
        >>> cover(groups, weight_G=weight_G, budget=3).tolist()  # 60 % are the first of 6 + 3 + 1, and both of 5 + 5
        [1, 2]
    """
    sorted_groups = SortedGroups.of(groups)
    floor_G = torch.zeros_like(sorted_groups.size_G) if floor_G is None else floor_G
    if not bool(torch.isfinite(weight_G).all()) or float(weight_G.min()) < 0:
        raise ValueError(f"Coverage weights must be finite and not negative, got {weight_G.tolist()}.")
    least, most = int(floor_G.sum()), int(sorted_groups.size_G.sum())
    if not least <= budget <= most:
        raise ValueError(
            f"The budget of {budget} channels must be between the floors' {least} and all {most}. Change `prune_ratio` "
            "or the floors."
        )
    weight_G = torch.ones_like(weight_G) if not bool(weight_G.any()) else weight_G
    count_G = _search(sorted_groups, weight_G=weight_G, budget=budget, floor_G=floor_G)
    return _repair(sorted_groups, count_G=count_G, missing=budget - int(count_G.sum()))


def _search(groups: SortedGroups, *, weight_G: Tensor, budget: int, floor_G: Tensor) -> Tensor:
    """The largest counts that stay within the budget."""
    low, high, multiplier = 0.0, torch.inf, 1.0
    best_G = floor_G
    for _ in range(MAX_ITERATIONS):
        coverage_G = (multiplier * weight_G).clamp(max=1.0)
        count_G = torch.maximum(groups.covering_counts(coverage_G), floor_G)
        if int(count_G.sum()) > budget:
            high = multiplier
        else:
            low, best_G = multiplier, count_G
        if int(best_G.sum()) == budget:
            break
        multiplier = 2 * low if high == torch.inf else (low + high) / 2
    return best_G


def _repair(groups: SortedGroups, *, count_G: Tensor, missing: int) -> Tensor:
    """Adds the `missing` channels of largest marginal score, which is what adding one at a time arrives at."""
    if missing == 0:
        return count_G
    window = min(missing, groups.score_GN.shape[1])
    place_GW = count_G[:, None] + torch.arange(window)
    open_GW = place_GW < groups.size_G[:, None]
    marginal_GW = groups.score_GN.gather(1, place_GW.clamp(max=groups.score_GN.shape[1] - 1))
    best = marginal_GW.masked_fill(~open_GW, -1.0).flatten().argsort(descending=True, stable=True)[:missing]
    return count_G + torch.bincount(best // window, minlength=len(count_G))
