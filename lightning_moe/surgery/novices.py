"""Novices: experts that go as a whole leave their mean output behind (MoNE, arXiv 2507.00390).  E experts, H hidden."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_moe.records import CalibrationStatistics, PrunePlan


@dataclass(frozen=True, kw_only=True, eq=False)
class Novices:
    """Constant outputs of the experts that one plan evicts.

    Args:
        plan_digest: digest of that plan.
        rows: per layer `[evicted experts, H]` float64 on the CPU, in the order of `PrunePlan.evicted`.
    """

    plan_digest: str
    rows: tuple[Tensor, ...]

    def check_fits(self, plan: PrunePlan) -> None:
        """Refuses another plan.

        Raises:
            ValueError: the novices were made for another plan.
        """
        if plan.digest != self.plan_digest:
            raise ValueError(
                f"The novices were made for plan {self.plan_digest[:12]}, got plan {plan.digest[:12]}. "
                "Run `mean_outputs` with the plan that is applied."
            )


def mean_outputs(
    statistics: CalibrationStatistics, *, plan: PrunePlan, corpora: Sequence[str] | None = None
) -> Novices:
    """Mean output of every expert that the plan evicts: `sum z / count` over its routed tokens, before the gate weight.

    MoNE's novice: the router goes on as it was, and a token that it sends to an evicted expert gets gate weight times
    this constant. The paper makes novices of the experts it chose by its own score; here any method may evict them. An
    expert that saw no token leaves zeros.

    Args:
        statistics: of the model that the plan was made for, with `output_sum`.
        plan: which channels stay.
        corpora: corpora that count; all when not given.

    Raises:
        ValueError: statistics of another model, or without `output_sum`, or an unknown corpus.
    """
    if statistics.shape != plan.shape:
        raise ValueError("The statistics are of another model than the plan's. Calibrate the model that is cut.")
    rows = []
    for index, sums in enumerate(statistics.total(corpora)):
        if "output_sum" not in sums:
            raise ValueError(
                "Novices need the statistic `output_sum`, and these statistics lack it. Run `calibrate` with `moments` "
                "set to true."
            )
        evicted = torch.tensor(plan.evicted(index), dtype=torch.int64)
        rows.append(sums["output_sum"][evicted] / sums["count"][evicted].clamp_min(1).unsqueeze(1))
    return Novices(plan_digest=plan.digest, rows=tuple(rows))
