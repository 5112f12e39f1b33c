"""Scores of whole experts by what they do to the layer's output and by what the router gives them.

Every criterion works on the plain sums over the tokens of the chosen corpora: a corpus weighs as much as it has tokens.
"""

# E experts

from collections.abc import Sequence

from lightning_moe.criteria.perturbation import DEFAULT_ALPHA, first_order_factor
from lightning_moe.criteria.scoring import score_experts
from lightning_moe.records import CalibrationStatistics, ExpertScores


def attribution(
    statistics: CalibrationStatistics, *, corpora: Sequence[str] | None = None, alpha: float = DEFAULT_ALPHA
) -> ExpertScores:
    """Paper A's phi: `max(0, 2 alpha (1 - alpha) * sum g <R, z> q)`, clamped after summing over all tokens.

    Closed form of its gradient (method, 1; arXiv 2606.18304). Unit: relative squared error of the layer's output,
    first order, summed over tokens. The published code leaves negative values in, which turns the channel order of
    such an expert around.

    Raises:
        ValueError: an unknown corpus, or `alpha` outside (0, 1).

    Examples:
        >>> statistics = one_layer(widths=[4, 4], attribution=[50, -2])
        >>> [round(score, 3) for score in attribution(statistics).scores[0].tolist()]  # 0.18 * 50; below 0 is 0
        [9.0, 0.0]
    """
    factor = first_order_factor(alpha=alpha)
    return score_experts(
        statistics,
        criterion="attribution",
        corpora=corpora,
        formula=lambda sums, _: (factor * sums["attribution"]).clamp(min=0.0),
    )


def ablation(statistics: CalibrationStatistics, *, corpora: Sequence[str] | None = None) -> ExpertScores:
    """Exact error of removing one expert, gates held: `sum g^2 ||z||^2 q` (method, 1; paper A's brute force).

    Unit: relative squared error of the layer's output, summed over tokens.

    Raises:
        ValueError: an unknown corpus.
    """
    return score_experts(statistics, criterion="ablation", corpora=corpora, formula=lambda sums, _: sums["ablation"])


def frequency(statistics: CalibrationStatistics, *, corpora: Sequence[str] | None = None) -> ExpertScores:
    """How many tokens were routed to the expert (usage, as in arXiv 2310.01334). Unit: tokens.

    Raises:
        ValueError: an unknown corpus.
    """
    return score_experts(statistics, criterion="frequency", corpora=corpora, formula=lambda sums, _: sums["count"])


def router_weight(statistics: CalibrationStatistics, *, corpora: Sequence[str] | None = None) -> ExpertScores:
    """Mean gate weight over **all** tokens, 0 where the expert was not chosen: `sum g / tokens`.

    Source: the "routing score" baseline of MoNE (arXiv 2507.00390); what the public code of He et al. (arXiv
    2406.02500) takes for DeepSeek. Frequency and strength of the gate in one number: the mean over routed tokens only
    would be another criterion. Deviation: `g` is the weight that the model multiplies with, after its own
    normalisation and scaling. Unit: gate weight per token.

    Raises:
        ValueError: an unknown corpus.
    """
    return score_experts(
        statistics,
        criterion="router_weight",
        corpora=corpora,
        formula=lambda sums, _: sums["gate_weight"] / sums["num_tokens"],
    )


def router_probability(statistics: CalibrationStatistics, *, corpora: Sequence[str] | None = None) -> ExpertScores:
    """Mean of the router's full probability over all tokens, chosen or not: `sum p / tokens`.

    Source: expert drop of He et al. (arXiv 2406.02500), as its public code does it for Mixtral. Deviations: the mean
    is over tokens (there: sums per sequence, the same order); a sigmoid router's scores are divided by their sum over
    the experts, so that they are a distribution; a correction bias that only chooses is left out. Unit: probability,
    a layer's scores sum to 1.

    Raises:
        ValueError: an unknown corpus.
    """
    return score_experts(
        statistics,
        criterion="router_probability",
        corpora=corpora,
        formula=lambda sums, _: sums["router_probability"] / sums["num_tokens"],
    )
