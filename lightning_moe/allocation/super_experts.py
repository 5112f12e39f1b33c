"""Experts whose single outputs are so large that the model leans on them (super experts)."""

# E experts

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_moe.records import CalibrationStatistics

QUANTILE = 0.995
SHARE_OF_MAXIMUM = 0.1


def super_experts(statistics: CalibrationStatistics, *, corpora: Sequence[str] | None = None) -> tuple[Tensor, ...]:
    """Experts with a `max |z|` above the 99.5 % quantile of the model's experts and above a tenth of the largest.

    Source: method, 3 (published: one zeroed super expert moved perplexity from 15 to 30). The quantile is interpolated
    between experts, so even a small model has one.

    Returns:
        Per layer bool [E].

    Raises:
        ValueError: an unknown corpus.

    Examples:
        >>> super_experts(one_layer(widths=[1] * 4, max_abs=[1, 2, 900, 1]))[0].tolist()
        [False, False, True, False]
    """
    largest = [sums["max_abs"] for sums in statistics.total(corpora)]
    every = torch.cat(largest)
    threshold = torch.maximum(every.quantile(QUANTILE), SHARE_OF_MAXIMUM * every.max())
    return tuple(max_abs_E > threshold for max_abs_E in largest)
