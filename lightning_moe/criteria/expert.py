"""Scores of whole experts.

Every criterion works on the plain sums over the tokens of the chosen corpora: a corpus weighs as much as it has tokens.
"""

# E experts

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from lightning_moe.criteria.perturbation import DEFAULT_ALPHA, first_order_factor
from lightning_moe.records import CalibrationStatistics, ExpertScores


class ExpertCriterion(Protocol):
    """What `EXPERT_CRITERIA` holds."""

    def __call__(self, statistics: CalibrationStatistics, *, corpora: Sequence[str] | None = None) -> ExpertScores:
        """One score per expert from the sums over `corpora` (all when not given)."""
        ...


def _score(
    statistics: CalibrationStatistics,
    *,
    criterion: str,
    corpora: Sequence[str] | None,
    formula: Callable[[Mapping[str, Tensor]], Tensor],
) -> ExpertScores:
    scores = tuple(formula(sums) for sums in statistics.total(corpora))
    return ExpertScores(shape=statistics.shape, criterion=criterion, scores=scores)


def attribution(
    statistics: CalibrationStatistics, *, corpora: Sequence[str] | None = None, alpha: float = DEFAULT_ALPHA
) -> ExpertScores:
    """Paper A's phi: `max(0, 2 alpha (1 - alpha) * sum g <R, z> q)`, clamped after summing over all tokens.

    Closed form of its gradient (method, 1). Unit: relative squared error of the layer's output, first order, summed
    over tokens. The published code leaves negative values in, which turns the channel order of such an expert around.

    Raises:
        ValueError: an unknown corpus, or `alpha` outside (0, 1).
    """
    factor = first_order_factor(alpha=alpha)
    return _score(
        statistics,
        criterion="attribution",
        corpora=corpora,
        formula=lambda sums: (factor * sums["attribution"]).clamp(min=0.0),
    )


def ablation(statistics: CalibrationStatistics, *, corpora: Sequence[str] | None = None) -> ExpertScores:
    """Exact error of removing one expert, gates held: `sum g^2 ||z||^2 q` (method, 1; paper A's brute force).

    Unit: relative squared error of the layer's output, summed over tokens.

    Raises:
        ValueError: an unknown corpus.
    """
    return _score(statistics, criterion="ablation", corpora=corpora, formula=lambda sums: sums["ablation"])


def reap(statistics: CalibrationStatistics, *, corpora: Sequence[str] | None = None) -> ExpertScores:
    """REAP's saliency: mean of `g ||z||` over the tokens routed to the expert, 0 for an expert that saw none.

    Source: REAP (router-weighted expert activation pruning). Unit: norm of the hidden state.

    Raises:
        ValueError: an unknown corpus.
    """
    return _score(
        statistics,
        criterion="reap",
        corpora=corpora,
        # Counts are whole numbers, so the clamp only touches 0, where the sum is 0 too.
        formula=lambda sums: sums["weighted_norm"] / sums["count"].clamp(min=1.0) * (sums["count"] > 0),
    )


def frequency(statistics: CalibrationStatistics, *, corpora: Sequence[str] | None = None) -> ExpertScores:
    """How many tokens were routed to the expert. Unit: tokens.

    Raises:
        ValueError: an unknown corpus.
    """
    return _score(statistics, criterion="frequency", corpora=corpora, formula=lambda sums: sums["count"])


EXPERT_CRITERIA: Mapping[str, ExpertCriterion] = {
    "attribution": attribution,
    "ablation": ablation,
    "reap": reap,
    "frequency": frequency,
}
