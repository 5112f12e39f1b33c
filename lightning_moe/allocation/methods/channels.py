"""Methods that decide channel by channel."""

# L layers, C channels of a layer

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from lightning_moe.allocation.alignment import Alignment
from lightning_moe.allocation.budget import resolve_align
from lightning_moe.allocation.floors import Floors
from lightning_moe.allocation.global_ranking import rank_globally
from lightning_moe.allocation.methods.base import PruningMethod, check_block, check_name
from lightning_moe.allocation.paper_a import cover_model
from lightning_moe.allocation.smoothing import check_smoothing, smooth
from lightning_moe.allocation.super_experts import super_experts
from lightning_moe.allocation.uniform import uniform_width
from lightning_moe.allocation.usage import check_usage_weight, usage_costs, usage_shares
from lightning_moe.criteria import CHANNEL_CRITERIA, EXPERT_CRITERIA
from lightning_moe.criteria.perturbation import DEFAULT_ALPHA, first_order_factor
from lightning_moe.records import CalibrationStatistics


@final
@dataclass(frozen=True, kw_only=True)
class ExactGlobal(PruningMethod):
    """Our default: exact channel ablation, one ranking of the whole model (method, 4b).

    Args:
        criterion: Channel criterion; it must be comparable across layers, as `channel_ablation` is.
        align: Channels of a block; kept widths are multiples of it. If not given: 64 where the widest expert has 512
            channels or more (a multiple of 64), else 16.
        layer_floor: Share of its channels that each layer keeps at least.
        expert_floor: Channels that each expert keeps at least, rounded up to blocks.
        protect_super_experts: Super experts keep at least one block.
        usage_weight: What a channel costs: 0 counts it as stored, 1 as often as a token uses it, in between both.
            Blocks are ranked by score over cost. If not given: 0, or what a budget of active parameters asks for.

    Raises:
        ValueError: a setting is out of range.

    Examples:
        >>> statistics = one_layer(widths=[2, 2], channel_ablation=[4, 1, 3, 2])
        >>> ExactGlobal(align=1).plan(statistics, prune_ratio=0.5).keep[0].tolist()
        [True, False, True, False]
    """

    criterion: str = "channel_ablation"
    align: int | None = None
    layer_floor: float = 0.0
    expert_floor: int = 0
    protect_super_experts: bool = True
    usage_weight: float | None = None

    name: ClassVar[str] = "exact_global"

    def __post_init__(self) -> None:
        check_name(self.criterion, field="criterion", known=CHANNEL_CRITERIA)
        check_block(self.align, name="align")
        Floors(layer_floor=self.layer_floor, expert_floor=self.expert_floor)
        check_usage_weight(self.usage_weight)

    def keep(
        self, statistics: CalibrationStatistics, *, prune_ratio: float, corpora: Sequence[str] | None
    ) -> tuple[Tensor, ...]:
        """See `rank_globally` and `usage_costs`."""
        costs = None
        if self.usage_weight:
            usage = usage_shares(statistics, corpora=corpora)
            costs = usage_costs(statistics.shape, usage=usage, usage_weight=self.usage_weight)
        return rank_globally(
            CHANNEL_CRITERIA[self.criterion](statistics, corpora=corpora),
            prune_ratio=prune_ratio,
            align=resolve_align(self.align, shape=statistics.shape),
            floors=_floors(self, statistics=statistics, corpora=corpora),
            costs=costs,
        )


@final
@dataclass(frozen=True, kw_only=True)
class PaperA(PruningMethod):
    """Paper A: attribution-guided coverage across layers and experts, then aligned widths (method, 2 and 3).

    Args:
        criterion: Channel criterion; the paper's is `activation_norm`.
        expert_weight: Expert criterion used as phi: `attribution` (first order, the paper's) or `ablation` (exact).
        smoothing: Of the layer losses: sqrt4, none, sqrt, log, huber or clip.
        min_width: Smallest width of an expert that stays, in channels, rounded up to blocks. If not given: 64 or 16,
            as for `align`.
        align: Channels of a block; kept widths are multiples of it. If not given: 64 where the widest expert has 512
            channels or more (a multiple of 64), else 16.
        alpha: The paper's perturbation; it scales losses and attributions and leaves the plan as it is.
        layer_floor: Share of its channels that each layer keeps at least.
        expert_floor: Channels that each expert keeps at least (when above 0, at least `min_width`).
        protect_super_experts: Super experts keep at least `min_width` channels.

    Raises:
        ValueError: a setting is out of range.
    """

    criterion: str = "activation_norm"
    expert_weight: str = "attribution"
    smoothing: str = "sqrt4"
    min_width: int | None = None
    align: int | None = None
    alpha: float = DEFAULT_ALPHA
    layer_floor: float = 0.0
    expert_floor: int = 0
    protect_super_experts: bool = True

    name: ClassVar[str] = "paper_a"

    def __post_init__(self) -> None:
        check_name(self.criterion, field="criterion", known=CHANNEL_CRITERIA)
        check_name(self.expert_weight, field="expert_weight", known=EXPERT_CRITERIA)
        check_smoothing(self.smoothing)
        first_order_factor(alpha=self.alpha)
        check_block(self.align, name="align")
        check_block(self.min_width, name="min_width")
        Floors(layer_floor=self.layer_floor, expert_floor=self.expert_floor)

    def keep(
        self, statistics: CalibrationStatistics, *, prune_ratio: float, corpora: Sequence[str] | None
    ) -> tuple[Tensor, ...]:
        """See `cover_model`; the layer loss is `(1 - alpha)^2 * sum ||R||^2 q`."""
        energy_L = torch.stack([sums["layer_energy"] for sums in statistics.total(corpora)])
        return cover_model(
            CHANNEL_CRITERIA[self.criterion](statistics, corpora=corpora),
            weights=EXPERT_CRITERIA[self.expert_weight](statistics, corpora=corpora),
            weight_L=smooth((1 - self.alpha) ** 2 * energy_L, smoothing=self.smoothing),
            prune_ratio=prune_ratio,
            alignment=Alignment(
                align=resolve_align(self.align, shape=statistics.shape),
                min_width=resolve_align(self.min_width, shape=statistics.shape),
            ),
            floors=_floors(self, statistics=statistics, corpora=corpora),
        )


def _floors(
    method: ExactGlobal | PaperA, *, statistics: CalibrationStatistics, corpora: Sequence[str] | None
) -> Floors:
    guarded = super_experts(statistics, corpora=corpora) if method.protect_super_experts else None
    return Floors(layer_floor=method.layer_floor, expert_floor=method.expert_floor, protected=guarded)


@final
@dataclass(frozen=True, kw_only=True)
class UniformWidth(PruningMethod):
    """One width for every expert of the model; the achieved ratio is rounded to a block.

    Args:
        criterion: Channel criterion that orders an expert's channels.
        align: The width is a multiple of this. If not given: 64 where experts have 512 channels or more (a multiple
            of 64), else 16.

    Raises:
        ValueError: a setting is out of range.
    """

    criterion: str = "channel_ablation"
    align: int | None = None

    name: ClassVar[str] = "uniform"

    def __post_init__(self) -> None:
        check_name(self.criterion, field="criterion", known=CHANNEL_CRITERIA)
        check_block(self.align, name="align")

    def keep(
        self, statistics: CalibrationStatistics, *, prune_ratio: float, corpora: Sequence[str] | None
    ) -> tuple[Tensor, ...]:
        """See `uniform_width`."""
        scores = CHANNEL_CRITERIA[self.criterion](statistics, corpora=corpora)
        align = resolve_align(self.align, shape=statistics.shape)
        return uniform_width(scores, prune_ratio=prune_ratio, align=align)
