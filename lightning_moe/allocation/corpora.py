"""Scores of several corpora side by side: made comparable, ordered, and put together."""

# K corpora, L layers, N scores of a layer (experts or channels)

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_moe.criteria import ChannelCriterion, ExpertCriterion
from lightning_moe.records import CalibrationStatistics

CORPUS_ORDERS = ("given", "name", "tokens")
# What one corpus' scores are divided by, so that a large or a loud corpus does not drown the others: nothing, its
# tokens, their sum over the model, their sum or their maximum in each layer.
NORMALISATIONS = ("none", "tokens", "model", "layer", "layer_max")


def ordered_corpora(statistics: CalibrationStatistics, *, corpora: Sequence[str] | None, order: str) -> list[str]:
    """The corpora in the order of their turns.

    Args:
        statistics: That know them.
        corpora: Names; all of the statistics when not given.
        order: `given` (as `corpora` lists them, or else the statistics), `name`, or `tokens` (largest first, equals as
            given).

    Raises:
        ValueError: a name is unknown or twice, or the list is empty.
    """
    statistics.total(corpora)
    names = list(statistics.corpora if corpora is None else corpora)
    if order == "name":
        return sorted(names)
    if order == "tokens":
        return sorted(names, key=lambda name: -num_tokens(statistics, corpus=name))
    return names


def num_tokens(statistics: CalibrationStatistics, *, corpus: str) -> float:
    """Tokens of a corpus that are not padding."""
    return float(statistics.corpora[corpus][0]["num_tokens"])


def normalise(scores: Sequence[Tensor], *, by: str, tokens: float) -> tuple[Tensor, ...]:
    """One corpus' scores, [N] per layer, divided by one of `NORMALISATIONS`; where that is 0 they stay 0.

    Args:
        scores: Nonnegative scores of one corpus.
        by: The divisor.
        tokens: Of this corpus.

    Examples:
        >>> scores = [torch.tensor([1.0, 3.0]), torch.tensor([0.0, 0.0])]
        >>> [score_N.tolist() for score_N in normalise(scores, by="layer", tokens=10)]
        [[0.25, 0.75], [0.0, 0.0]]
    """
    divisors: Mapping[str, Callable[[], Sequence[float]]] = {
        "none": lambda: [1.0] * len(scores),
        "tokens": lambda: [tokens] * len(scores),
        "model": lambda: [sum(float(score_N.sum()) for score_N in scores)] * len(scores),
        "layer": lambda: [float(score_N.sum()) for score_N in scores],
        "layer_max": lambda: [float(score_N.max()) for score_N in scores],
    }
    return tuple(score_N / (divisor or 1.0) for score_N, divisor in zip(scores, divisors[by](), strict=True))


def corpus_scores(
    statistics: CalibrationStatistics,
    *,
    corpora: Sequence[str],
    criterion: ChannelCriterion | ExpertCriterion,
    normalised_by: str,
) -> list[Tensor]:
    """Scores of each corpus alone, comparable between corpora: float64 [K, N] per layer, rows as in `corpora`.

    Args:
        statistics: Of the model.
        corpora: Names.
        criterion: Of channels or of experts.
        normalised_by: One of `NORMALISATIONS`.

    Raises:
        ValueError: an unknown corpus, or a statistic that the criterion needs is missing.
    """
    rows = [
        normalise(
            criterion(statistics, corpora=[corpus]).scores,
            by=normalised_by,
            tokens=num_tokens(statistics, corpus=corpus),
        )
        for corpus in corpora
    ]
    return [torch.stack(layer) for layer in zip(*rows, strict=True)]
