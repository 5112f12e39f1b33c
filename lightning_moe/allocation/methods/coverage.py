"""Methods in which no corpus loses what it needs most: paper B for experts, ours for channels."""

# K corpora, L layers

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from lightning_moe.allocation.budget import check_count, resolve_align
from lightning_moe.allocation.channel_coverage import cover_corpora
from lightning_moe.allocation.corpora import (
    CORPUS_ORDERS,
    NORMALISATIONS,
    corpus_scores,
    num_tokens,
    ordered_corpora,
)
from lightning_moe.allocation.expert_coverage import FILLS, POOLED, cover_experts
from lightning_moe.allocation.floors import Floors
from lightning_moe.allocation.methods.base import ExpertMethod, PruningMethod, check_block, check_name, check_share
from lightning_moe.allocation.super_experts import super_experts
from lightning_moe.criteria import CHANNEL_CRITERIA, EXPERT_CRITERIA
from lightning_moe.records import CalibrationStatistics


@final
@dataclass(frozen=True, kw_only=True)
class TBCoverage(ExpertMethod):
    """Paper B, Generic TB-Coverage (arXiv 2607.01710): in each layer corpora take turns protecting experts.

    Each corpus has its own utility per expert. Of the places that a layer keeps, a fixed number is protected: corpora
    take turns, each with its best expert that is not protected yet. The other places go by an aggregate score. The
    public text leaves the utility, the number of protected places, their order, and the aggregate open: all are
    settings here, and the defaults are our choice. With one corpus it is the plain ranking by the utility.

    Args:
        utility: Expert criterion, taken on each corpus alone.
        protected_share: Share of a layer's kept places that is protected, in [0, 1], rounded; 0 is no coverage.
        protected_count: Number of protected places of a layer, instead of the share.
        fill: Aggregate of the other places: `sum` or `max` over corpora of the normalised utility, `mean` (weighted by
            tokens), `pooled` (the criterion on the sums of all corpora), or `rank` (sum of ranks).
        normalise: What a corpus' utilities are divided by first: `layer` or `layer_max` (their sum or maximum in the
            layer), `model` (their sum over the model), `tokens` (of the corpus), or `none`.
        order: Whose turn is first: `given` (as corpora are listed in the plan or the file), `name`, or `tokens`
            (largest first).

    Raises:
        ValueError: a setting is out of range.

    Examples:
        >>> statistics = one_layer(widths=[8, 8, 8, 8], weighted_norm=[1, 4, 3, 2])  # one corpus: its REAP
        >>> TBCoverage(utility="reap").plan(statistics, prune_ratio=0.5).widths(0)
        (0, 8, 8, 0)
    """

    utility: str = "reap"
    protected_share: float = 0.5
    protected_count: int | None = None
    fill: str = "sum"
    normalise: str = "layer"
    order: str = "given"

    name: ClassVar[str] = "tb_coverage"

    def __post_init__(self) -> None:
        check_name(self.utility, field="utility", known=EXPERT_CRITERIA)
        check_share(self.protected_share, name="protected_share")
        if self.protected_count is not None:
            check_count(self.protected_count, name="protected_count", lowest=0)
        check_name(self.fill, field="fill", known=[*FILLS, POOLED])
        check_name(self.normalise, field="normalise", known=NORMALISATIONS)
        check_name(self.order, field="order", known=CORPUS_ORDERS)

    def keep(
        self, statistics: CalibrationStatistics, *, prune_ratio: float, corpora: Sequence[str] | None
    ) -> tuple[Tensor, ...]:
        """See `cover_experts`."""
        names = ordered_corpora(statistics, corpora=corpora, order=self.order)
        criterion = EXPERT_CRITERIA[self.utility]
        return cover_experts(
            criterion(statistics, corpora=names),
            utilities=corpus_scores(statistics, corpora=names, criterion=criterion, normalised_by=self.normalise),
            tokens_K=torch.tensor([num_tokens(statistics, corpus=name) for name in names], dtype=torch.float64),
            fill=self.fill,
            protected_share=self.protected_share,
            protected_count=self.protected_count,
            prune_ratio=prune_ratio,
        )


@final
@dataclass(frozen=True, kw_only=True)
class ChannelCoverage(PruningMethod):
    """Ours: paper B's round robin for blocks of channels, over the whole model, under the budget of `exact_global`.

    Corpora take turns protecting the `align` channels of one expert that sum to most by their own score, among those
    that nobody has protected yet; the rest of the budget goes to the best blocks of free channels by the sum over
    corpora. With one corpus, or nothing protected, it is `exact_global` on scores of equal weight per corpus.

    Args:
        criterion: Channel criterion, taken on each corpus alone; it must be comparable across layers.
        protected_share: Share of the kept blocks that is protected, in [0, 1], rounded.
        normalise: What a corpus' scores are divided by before they are summed, so that a corpus of more tokens or
            larger errors does not drown the others: `model` (their sum over the model), `tokens` (of the corpus),
            `none`, or `layer` and `layer_max` (per layer, which gives up the comparison between layers).
        order: Whose turn is first: `given` (as corpora are listed in the plan or the file), `name`, or `tokens`
            (largest first).
        align: Channels of a block; kept widths are multiples of it. If not given: 64 where the widest expert has 512
            channels or more (a multiple of 64), else 16.
        layer_floor: Share of its channels that each layer keeps at least.
        expert_floor: Channels that each expert keeps at least, rounded up to blocks.
        protect_super_experts: Super experts keep at least one block.

    Raises:
        ValueError: a setting is out of range.
    """

    criterion: str = "channel_ablation"
    protected_share: float = 0.5
    normalise: str = "model"
    order: str = "given"
    align: int | None = None
    layer_floor: float = 0.0
    expert_floor: int = 0
    protect_super_experts: bool = True

    name: ClassVar[str] = "channel_coverage"

    def __post_init__(self) -> None:
        check_name(self.criterion, field="criterion", known=CHANNEL_CRITERIA)
        check_share(self.protected_share, name="protected_share")
        check_name(self.normalise, field="normalise", known=NORMALISATIONS)
        check_name(self.order, field="order", known=CORPUS_ORDERS)
        check_block(self.align, name="align")
        Floors(layer_floor=self.layer_floor, expert_floor=self.expert_floor)

    def keep(
        self, statistics: CalibrationStatistics, *, prune_ratio: float, corpora: Sequence[str] | None
    ) -> tuple[Tensor, ...]:
        """See `cover_corpora`."""
        names = ordered_corpora(statistics, corpora=corpora, order=self.order)
        criterion = CHANNEL_CRITERIA[self.criterion]
        guarded = super_experts(statistics, corpora=names) if self.protect_super_experts else None
        return cover_corpora(
            statistics.shape,
            scores=corpus_scores(statistics, corpora=names, criterion=criterion, normalised_by=self.normalise),
            protected_share=self.protected_share,
            prune_ratio=prune_ratio,
            align=resolve_align(self.align, shape=statistics.shape),
            floors=Floors(layer_floor=self.layer_floor, expert_floor=self.expert_floor, protected=guarded),
        )
