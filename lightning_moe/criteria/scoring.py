"""What every criterion has in common: its form, the loop over the layers, and what it may miss."""

# C channels of a layer, E experts

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from lightning_moe.records import CalibrationStatistics, ChannelScores, ExpertScores

LayerValues = Mapping[str, Tensor]
# (sums of a layer, weight norms of the layer) -> score [C] or [E]
Formula = Callable[[LayerValues, LayerValues], Tensor]

NEEDS_MOMENTS = "Calibrate again with `calibrate --moments true`."
NEEDS_GRADIENTS = "Calibrate again with `calibrate --gradients true`."
NEEDS_WEIGHT_SUMS = "An older version wrote them: calibrate again, no option is needed."


class ChannelCriterion(Protocol):
    """What `CHANNEL_CRITERIA` holds."""

    def __call__(self, statistics: CalibrationStatistics, *, corpora: Sequence[str] | None = None) -> ChannelScores:
        """One score per channel from the sums over `corpora` (all when not given)."""
        ...


class ExpertCriterion(Protocol):
    """What `EXPERT_CRITERIA` holds."""

    def __call__(self, statistics: CalibrationStatistics, *, corpora: Sequence[str] | None = None) -> ExpertScores:
        """One score per expert from the sums over `corpora` (all when not given)."""
        ...


def score_channels(
    statistics: CalibrationStatistics, *, criterion: str, corpora: Sequence[str] | None, formula: Formula
) -> ChannelScores:
    """The formula on every layer.

    Raises:
        ValueError: the formula reads a sum that the statistics do not hold.
    """
    scores = _score(statistics, criterion=criterion, corpora=corpora, formula=formula)
    return ChannelScores(shape=statistics.shape, criterion=criterion, scores=scores)


def score_experts(
    statistics: CalibrationStatistics, *, criterion: str, corpora: Sequence[str] | None, formula: Formula
) -> ExpertScores:
    """The formula on every layer.

    Raises:
        ValueError: the formula reads a sum that the statistics do not hold.
    """
    scores = _score(statistics, criterion=criterion, corpora=corpora, formula=formula)
    return ExpertScores(shape=statistics.shape, criterion=criterion, scores=scores)


def _score(
    statistics: CalibrationStatistics, *, criterion: str, corpora: Sequence[str] | None, formula: Formula
) -> tuple[Tensor, ...]:
    layers = list(zip(statistics.total(corpora), statistics.weights, strict=True))
    try:
        return tuple(formula(sums, weights) for sums, weights in layers)
    except KeyError as error:
        held = [", ".join(sorted(values)) for values in layers[0]]
        raise ValueError(
            f"Criterion '{criterion}' reads {error}, which these statistics do not hold. Sums: {held[0]}. Of the "
            f"weights: {held[1]}."
        ) from error


def needed(values: LayerValues, name: str, *, criterion: str, remedy: str) -> Tensor:
    """An optional statistic, in its own shape.

    Raises:
        ValueError: it was not gathered; the message ends with `remedy`.
    """
    if name not in values:
        raise ValueError(f"Criterion '{criterion}' needs '{name}', which these statistics do not hold. {remedy}")
    return values[name]


def mean_over_routed(sums: LayerValues, name: str) -> Tensor:
    """A sum over routed tokens divided by their number, `[E]`; 0 for an expert that saw none.

    Examples:
        >>> sums = {"norm": torch.tensor([6.0, 0.0]), "count": torch.tensor([3.0, 0.0])}
        >>> mean_over_routed(sums, "norm").tolist()
        [2.0, 0.0]
    """
    # Counts are whole numbers, so the clamp only touches 0, where the sum is 0 too.
    return sums[name] / sums["count"].clamp(min=1.0) * (sums["count"] > 0)
