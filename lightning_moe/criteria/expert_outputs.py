"""Scores of whole experts by the size and the spread of their outputs, and by their weights alone.

Means are over the tokens that the router sent to the expert, in the chosen corpora; an expert that saw none scores 0.
"""

# E experts, C channels of a layer, H hidden

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_moe.criteria.scoring import (
    NEEDS_MOMENTS,
    NEEDS_WEIGHT_SUMS,
    LayerValues,
    mean_over_routed,
    needed,
    score_experts,
)
from lightning_moe.records import CalibrationStatistics, ExpertScores, LayerShape


def reap(statistics: CalibrationStatistics, *, corpora: Sequence[str] | None = None) -> ExpertScores:
    """REAP's saliency: mean of `g ||z||` over the tokens routed to the expert.

    Source: REAP, router-weighted expert activation pruning (arXiv 2510.13999). Unit: norm of the hidden state.

    Raises:
        ValueError: an unknown corpus.

    Examples:
        >>> statistics = one_layer(widths=[4, 4, 4], weighted_norm=[6, 5, 0], count=[3, 2, 0])
        >>> reap(statistics).scores[0].tolist()  # 6 / 3, 5 / 2, unused
        [2.0, 2.5, 0.0]
    """
    return score_experts(
        statistics,
        criterion="reap",
        corpora=corpora,
        formula=lambda sums, _: mean_over_routed(sums, "weighted_norm"),
    )


def man(statistics: CalibrationStatistics, *, corpora: Sequence[str] | None = None) -> ExpertScores:
    """Mean activation norm: mean of `||z||` over the tokens routed to the expert, without its gate weight.

    Source: MAN (arXiv 2606.15716). Unit: norm of the hidden state.

    Raises:
        ValueError: an unknown corpus.
    """
    return score_experts(
        statistics, criterion="man", corpora=corpora, formula=lambda sums, _: mean_over_routed(sums, "norm")
    )


def msan(statistics: CalibrationStatistics, *, corpora: Sequence[str] | None = None) -> ExpertScores:
    """Mean squared activation norm: mean of `||z||^2` over the tokens routed to the expert.

    Source: MSAN (arXiv 2606.15716). Unit: squared norm of the hidden state.

    Raises:
        ValueError: an unknown corpus.
    """
    return score_experts(
        statistics, criterion="msan", corpora=corpora, formula=lambda sums, _: mean_over_routed(sums, "sq_norm")
    )


def mone(statistics: CalibrationStatistics, *, corpora: Sequence[str] | None = None) -> ExpertScores:
    """MoNE's redundancy, turned to importance: spread of the output times routing score.

    `sqrt(sum_h var_h) * sum g / tokens`, where `var_h` is the unbiased variance of hidden dimension h of z over the n
    tokens routed to the expert, `(sum z_h^2 - (sum z_h)^2 / n) / (n - 1)`; with n < 2 there is no spread: 0. What its
    mean output can replace scores low. Unit: norm of the hidden state.

    Source: MoNE (arXiv 2507.00390), where both factors are called output variance and access frequency; the public
    code takes the norm of the per-dimension *standard deviations*, and gate weights summed over all tokens. Deviations:
    its constant factor is dropped; its variance is a running one around means that still move, ours is exact.

    Raises:
        ValueError: an unknown corpus, or statistics without the [E, H] sums.
    """

    def formula(sums: LayerValues, _: LayerValues) -> Tensor:
        sum_EH = needed(sums, "output_sum", criterion="mone", remedy=NEEDS_MOMENTS)
        square_EH = needed(sums, "output_sq", criterion="mone", remedy=NEEDS_MOMENTS)
        count_E = sums["count"]
        spread_EH = (square_EH - sum_EH.square() / count_E.clamp(min=1.0).unsqueeze(1)).clamp(min=0.0)
        variance_E = spread_EH.sum(1) / (count_E - 1).clamp(min=1.0) * (count_E > 1)
        return variance_E.sqrt() * sums["gate_weight"] / sums["num_tokens"]

    return score_experts(statistics, criterion="mone", corpora=corpora, formula=formula)


def aimer(statistics: CalibrationStatistics, *, corpora: Sequence[str] | None = None) -> ExpertScores:
    """AIMER turned over: root mean square over absolute mean of all weights of the expert, blind to data.

    With N weights in its three matrices: `sqrt(sum w^2 / N) / (sum |w| / N)`, at least 1 (all weights equal in size),
    1.25 for normally distributed weights, larger where few weights hold most of it. No unit.

    Source: AIMER (arXiv 2603.18492) scores the inverse, absolute mean over root mean square, and prunes the experts
    with the **highest** values; here higher is kept, as everywhere, hence the inverse. Deviation: an expert whose
    weights are all 0 scores 0, so it goes first (there it would stay to the last). The corpora are checked and
    otherwise not used.

    Raises:
        ValueError: an unknown corpus, or statistics without the sums of absolute weights.
    """
    statistics.total(corpora)
    hidden_size = statistics.shape.hidden_size
    scores = tuple(
        _peakedness(layer, weights=weights, hidden_size=hidden_size)
        for layer, weights in zip(statistics.shape.layers, statistics.weights, strict=True)
    )
    return ExpertScores(shape=statistics.shape, criterion="aimer", scores=scores)


def _peakedness(layer: LayerShape, *, weights: LayerValues, hidden_size: int) -> Tensor:
    names = ("gate", "up", "down")
    square_C = torch.stack([weights[f"{name}_sq_norm"] for name in names]).sum(0)
    abs_3C = [needed(weights, f"{name}_abs_sum", criterion="aimer", remedy=NEEDS_WEIGHT_SUMS) for name in names]
    square_E, abs_E = (_per_expert(layer, value_C) for value_C in (square_C, torch.stack(abs_3C).sum(0)))
    numel_E = 3.0 * hidden_size * torch.tensor(layer.widths, dtype=torch.float64)
    return torch.where(abs_E > 0, (square_E * numel_E).sqrt() / abs_E, 0.0)


def _per_expert(layer: LayerShape, value_C: Tensor) -> Tensor:
    return torch.stack([value_n.sum() for value_n in value_C.split(layer.widths)])
