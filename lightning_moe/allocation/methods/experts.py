"""Methods that decide expert by expert."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, final

from torch import Tensor

from lightning_moe.allocation.expert_dropping import drop_experts
from lightning_moe.allocation.methods.base import PruningMethod, check_name
from lightning_moe.criteria import EXPERT_CRITERIA
from lightning_moe.records import CalibrationStatistics


@final
@dataclass(frozen=True, kw_only=True)
class ExpertDropping(PruningMethod):
    """Whole experts go, the same share in every layer.

    Args:
        criterion: Expert criterion: the lowest scores go first.

    Raises:
        ValueError: an unknown criterion.
    """

    criterion: str = "reap"
    align: int | None = field(default=1, init=False)

    name: ClassVar[str] = "expert_dropping"

    def __post_init__(self) -> None:
        check_name(self.criterion, field="criterion", known=EXPERT_CRITERIA)

    def keep(
        self, statistics: CalibrationStatistics, *, prune_ratio: float, corpora: Sequence[str] | None
    ) -> tuple[Tensor, ...]:
        """See `drop_experts`."""
        scores = EXPERT_CRITERIA[self.criterion](statistics, corpora=corpora)
        return drop_experts(scores, prune_ratio=prune_ratio)
