"""Scores of single channels.

Every criterion works on the plain sums over the tokens of the chosen corpora: a corpus weighs as much as it has tokens.
"""

# C channels of a layer

from collections.abc import Sequence

from torch import Tensor

from lightning_moe.criteria.perturbation import DEFAULT_ALPHA, first_order_factor
from lightning_moe.criteria.scoring import NEEDS_WEIGHT_SUMS, LayerValues, needed, score_channels
from lightning_moe.records import CalibrationStatistics, ChannelScores

# CAMERA's published weights of the summed and of the largest activation.
_CAMERA_SUM, _CAMERA_MAX = 0.1, 0.9


def channel_ablation(statistics: CalibrationStatistics, *, corpora: Sequence[str] | None = None) -> ChannelScores:
    """Exact error of removing one channel, gates held: `||W_down[:, c]||^2 * sum g^2 h_c^2 q` (method, 1 and 4b).

    Unit: relative squared error of the decoder layer's output, summed over tokens; comparable across the whole model.

    Raises:
        ValueError: an unknown corpus.

    Examples:
        >>> statistics = one_layer(widths=[2, 1], channel_ablation=[2, 3, 0], down_sq_norm=[5, 0.5, 9])
        >>> channel_ablation(statistics).scores[0].tolist()  # 2 * 5, 3 * 0.5, 0 * 9
        [10.0, 1.5, 0.0]
    """
    return score_channels(
        statistics,
        criterion="channel_ablation",
        corpora=corpora,
        formula=lambda sums, weights: sums["channel_ablation"] * weights["down_sq_norm"],
    )


def channel_saliency(
    statistics: CalibrationStatistics, *, corpora: Sequence[str] | None = None, alpha: float = DEFAULT_ALPHA
) -> ChannelScores:
    """Paper A's saliency at the input of W_down: `2 alpha (1 - alpha) * sum g |h_c <R, W_down[:, c]>| q`.

    Closed form of abs(activation * gradient) (method, 1; arXiv 2606.18304). Unit: relative squared error of the
    layer's output, first order, summed over tokens.

    Raises:
        ValueError: an unknown corpus, or `alpha` outside (0, 1).
    """
    factor = first_order_factor(alpha=alpha)
    return score_channels(
        statistics,
        criterion="channel_saliency",
        corpora=corpora,
        formula=lambda sums, _: factor * sums["channel_saliency"],
    )


def activation_norm(statistics: CalibrationStatistics, *, corpora: Sequence[str] | None = None) -> ChannelScores:
    """Paper A's default metric: mean of the L2 norms of a, u and h of the channel, divided by its layer's mean.

    `s_c = (sqrt(sum a^2) + sqrt(sum u^2) + sqrt(sum h^2)) / 3`, sums over the pairs routed to its expert; no unit, the
    mean of a layer is 1 (a layer without any activation scores 0 throughout). Source: arXiv 2606.18304.

    Raises:
        ValueError: an unknown corpus.

    Examples:
        >>> statistics = one_layer(widths=[1, 1], gate_sq=[4, 1], up_sq=[1, 0], hidden_sq=[9, 289])
        >>> activation_norm(statistics).scores[0].tolist()  # (2 + 1 + 3) / 3 and (1 + 0 + 17) / 3, over their mean of 4
        [0.5, 1.5]
    """

    def formula(sums: LayerValues, _: LayerValues) -> Tensor:
        norm_C = (sums["gate_sq"].sqrt() + sums["up_sq"].sqrt() + sums["hidden_sq"].sqrt()) / 3
        mean = norm_C.mean()
        return norm_C / mean if mean > 0 else norm_C

    return score_channels(statistics, criterion="activation_norm", corpora=corpora, formula=formula)


def camera(statistics: CalibrationStatistics, *, corpora: Sequence[str] | None = None) -> ChannelScores:
    """CAMERA's energy: `||W_down[:, c]||^2 * (0.1 * sum (g h_c)^2 + 0.9 * max (g h_c)^2)` (method, 1).

    Source: CAMERA (arXiv 2508.02322). Unit: squared norm of the channel's contribution to the layer's output.

    Raises:
        ValueError: an unknown corpus.
    """

    def formula(sums: LayerValues, weights: LayerValues) -> Tensor:
        energy_C = _CAMERA_SUM * sums["weighted_sq"] + _CAMERA_MAX * sums["max_weighted_sq"]
        return energy_C * weights["down_sq_norm"]

    return score_channels(statistics, criterion="camera", corpora=corpora, formula=formula)


def weight_norm(statistics: CalibrationStatistics, *, corpora: Sequence[str] | None = None) -> ChannelScores:
    """Magnitude, blind to data: `sqrt(||W_gate[c]||^2 + ||W_up[c]||^2 + ||W_down[:, c]||^2)`.

    The L2 norm of everything that the channel stores, the structured form of magnitude pruning (arXiv 1506.02626); no
    unit but the weights'. The corpora are checked and otherwise not used.

    Raises:
        ValueError: an unknown corpus.
    """

    def formula(_: LayerValues, weights: LayerValues) -> Tensor:
        return (weights["gate_sq_norm"] + weights["up_sq_norm"] + weights["down_sq_norm"]).sqrt()

    return score_channels(statistics, criterion="weight_norm", corpora=corpora, formula=formula)


def wanda(statistics: CalibrationStatistics, *, corpora: Sequence[str] | None = None) -> ChannelScores:
    """Weight times activation at the input of W_down: `sum_h |W_down[h, c]| * sqrt(sum h_c^2)`.

    Wanda (arXiv 2306.11695) scores a weight by `|W_hc| * ||X_c||_2`; a channel's score is the sum over its column of
    W_down, as in the structured form of it (Wanda-sp, arXiv 2312.11983; the mean there, the same order). Exact.

    Deviations: the rows of W_gate and W_up count nothing, also in Wanda-sp: their `sum_h |W_ch| ||x_h||` cannot be had
    from sums that add up over corpora. The norm is over the tokens routed to the channel's expert and is not divided
    by their number, so between experts it grows with use. Unit: norm of activations times weights.

    Raises:
        ValueError: an unknown corpus, or statistics without the sums of absolute weights.
    """

    def formula(sums: LayerValues, weights: LayerValues) -> Tensor:
        down_C = needed(weights, "down_abs_sum", criterion="wanda", remedy=NEEDS_WEIGHT_SUMS)
        return down_C * sums["hidden_sq"].sqrt()

    return score_channels(statistics, criterion="wanda", corpora=corpora, formula=formula)
