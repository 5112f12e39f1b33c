"""Scores of single channels from gradients of the language-model loss, gathered by `calibrate --gradients true`.

Both stand on one number per channel and sequence. A factor m_c on channel c (1 in the model, 0 when it is cut) has the
derivative `dL/dm_c = sum_t h_c dL/dh_c` over the tokens of the sequence, and this equals `sum_w w dL/dw` over the
channel's column of W_down, and over its row of W_up. L is the next-token loss of the sequence, summed over its tokens.
"""

# C channels of a layer

from collections.abc import Sequence

from torch import Tensor

from lightning_moe.criteria.scoring import NEEDS_GRADIENTS, LayerValues, needed, score_channels
from lightning_moe.records import CalibrationStatistics, ChannelScores


def snip(statistics: CalibrationStatistics, *, corpora: Sequence[str] | None = None) -> ChannelScores:
    """SNIP's connection sensitivity of a channel: `|sum h_c dL/dh_c|` over all tokens of all chosen corpora.

    SNIP (arXiv 1810.02340) takes the size of the derivative of the loss with respect to a factor on each weight,
    `|w dL/dw|` on one batch; here the factor stands on the channel. The size is taken after summing over everything
    chosen (one batch that holds all text), so that neither batches nor their order matter. Deviations: SNIP normalises
    the scores to sum 1, and asks an untrained network; in a trained one derivatives of either sign cancel. Unit: nats.

    Raises:
        ValueError: an unknown corpus, or statistics without gradients.

    Examples:
        >>> snip(one_layer(widths=[2], loss_snip=[-3, 2])).scores[0].tolist()
        [3.0, 2.0]
    """

    def formula(sums: LayerValues, _: LayerValues) -> Tensor:
        return needed(sums, "loss_snip", criterion="snip", remedy=NEEDS_GRADIENTS).abs()

    return score_channels(statistics, criterion="snip", corpora=corpora, formula=formula)


def taylor(statistics: CalibrationStatistics, *, corpora: Sequence[str] | None = None) -> ChannelScores:
    """First-order Taylor importance: `sum over sequences of (sum_t h_c dL/dh_c)^2`, comparable across the model.

    Molchanov et al. (arXiv 1906.10771) square the derivative of the loss with respect to a factor on a group of
    parameters, per mini-batch, and average. Deviations: the mini-batch is one sequence (row of text), so that batching
    does not matter, and squares are summed, not averaged (the same order). Unit: squared nats.

    Raises:
        ValueError: an unknown corpus, or statistics without gradients.
    """

    def formula(sums: LayerValues, _: LayerValues) -> Tensor:
        return needed(sums, "loss_taylor", criterion="taylor", remedy=NEEDS_GRADIENTS)

    return score_channels(statistics, criterion="taylor", corpora=corpora, formula=formula)
