"""Methods that decide expert by expert."""

# E experts

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from lightning_moe.allocation.budget import check_count
from lightning_moe.allocation.expert_dropping import drop_experts, drop_experts_globally
from lightning_moe.allocation.expert_subsets import MAX_SUBSETS, drop_subsets, tries_all_subsets
from lightning_moe.allocation.methods.base import ExpertMethod, check_name
from lightning_moe.criteria import EXPERT_CRITERIA
from lightning_moe.records import CalibrationStatistics, ExpertScores, ModelShape

SCOPES = ("layer", "global")
# The others are norms of the hidden state, which grow with depth.
COMPARABLE = ("attribution", "ablation", "frequency", "router_weight", "router_probability", "aimer")


@final
@dataclass(frozen=True, kw_only=True)
class ExpertDropping(ExpertMethod):
    """Whole experts go by one score each: the same share in every layer, or the worst of the model.

    Presets by criterion, sources there: `frequency`, `router_weight`, `router_probability`, `reap`, `man`, `msan`,
    `mone`, `aimer`.

    Args:
        criterion: Expert criterion: the lowest scores go first.
        scope: `layer` (every layer loses the same share, as published for all of them) or `global` (all experts of
            the model in one ranking, top-k of each layer kept; for criteria that mean the same in every layer).

    Raises:
        ValueError: an unknown criterion or scope, or a global ranking by norms of the hidden state.

    Examples:
        >>> statistics = one_layer(widths=[8, 8, 8, 8], count=[1, 4, 3, 2])
        >>> ExpertDropping(criterion="frequency").plan(statistics, prune_ratio=0.5).widths(0)
        (0, 8, 8, 0)
    """

    criterion: str = "reap"
    scope: str = "layer"

    name: ClassVar[str] = "expert_dropping"

    def __post_init__(self) -> None:
        check_name(self.criterion, field="criterion", known=EXPERT_CRITERIA)
        check_name(self.scope, field="scope", known=SCOPES)
        if self.scope == "global" and self.criterion not in COMPARABLE:
            raise ValueError(
                f"`scope`='global' needs a criterion that means the same in every layer, one of {list(COMPARABLE)}, "
                f"got {self.criterion!r}: outputs grow with depth. Take one of those, or `scope`='layer'."
            )

    @property
    def per_layer(self) -> bool:
        """Every layer loses the same share."""
        return self.scope == "layer"

    def keep(
        self, statistics: CalibrationStatistics, *, prune_ratio: float, corpora: Sequence[str] | None
    ) -> tuple[Tensor, ...]:
        """See `drop_experts` and `drop_experts_globally`."""
        scores = EXPERT_CRITERIA[self.criterion](statistics, corpora=corpora)
        drop = drop_experts if self.per_layer else drop_experts_globally
        return drop(scores, prune_ratio=prune_ratio)


@final
@dataclass(frozen=True, kw_only=True)
class RandomExperts(ExpertMethod):
    """Whole experts go at random, the same share in every layer: the floor that any score must beat.

    Args:
        seed: Of the random numbers; the same plan on every machine.

    Raises:
        ValueError: a seed that is not a whole number >= 0.
    """

    seed: int = 0

    name: ClassVar[str] = "random"

    def __post_init__(self) -> None:
        check_count(self.seed, name="seed", lowest=0)

    def keep(
        self, statistics: CalibrationStatistics, *, prune_ratio: float, corpora: Sequence[str] | None
    ) -> tuple[Tensor, ...]:
        """See `drop_experts`; the scores are uniform random numbers."""
        generator = torch.Generator().manual_seed(self.seed)
        scores = tuple(
            torch.rand(layer.num_experts, generator=generator, dtype=torch.float64) for layer in statistics.shape.layers
        )
        return drop_experts(
            ExpertScores(shape=statistics.shape, criterion=self.name, scores=scores), prune_ratio=prune_ratio
        )


@final
@dataclass(frozen=True, kw_only=True)
class ExpertSparsity(ExpertMethod):
    """Each layer keeps the set of experts without whose rivals its output changes least (arXiv 2402.14800).

    Deviations from the source: **re-routing is not modelled** (the paper runs the layer with the router restricted to
    the set, here gates are held, so that the stored Gram of `g z` gives every error exactly and no second pass is
    needed); the error is squared and of the routed sum; where there are too many sets for trying all, as the paper
    does with 8 experts, or experts differ in width, they go greedily. The plan's provenance says which. Needs
    `calibrate` with moments.

    Args:
        max_subsets: Sets of experts that are tried at most in a layer; with more, experts go one by one.

    Raises:
        ValueError: `max_subsets` is not a whole number >= 0.
    """

    max_subsets: int = MAX_SUBSETS

    name: ClassVar[str] = "expert_sparsity"

    def __post_init__(self) -> None:
        check_count(self.max_subsets, name="max_subsets", lowest=0)

    def keep(
        self, statistics: CalibrationStatistics, *, prune_ratio: float, corpora: Sequence[str] | None
    ) -> tuple[Tensor, ...]:
        """See `drop_subsets`."""
        layers = statistics.total(corpora)
        if not all("output_gram" in sums for sums in layers):
            raise ValueError(
                f"Method '{self.name}' needs 'output_gram', which these statistics do not hold. Calibrate again with "
                "`calibrate --moments true`."
            )
        grams = [sums["output_gram"] for sums in layers]
        return drop_subsets(statistics.shape, grams=grams, prune_ratio=prune_ratio, max_subsets=self.max_subsets)

    def remarks(self, shape: ModelShape, *, prune_ratio: float) -> Mapping[str, str]:
        """Which search was used, and that tokens were not routed anew."""
        settings = {"prune_ratio": prune_ratio, "max_subsets": self.max_subsets}
        exhaustive = (tries_all_subsets(layer, **settings) for layer in shape.layers)
        counts = Counter("exhaustive" if every else "greedy" for every in exhaustive)
        search = ", ".join(f"{kind} in {count} layers" for kind, count in sorted(counts.items()))
        return {"search": next(iter(counts)) if len(counts) == 1 else search, "rerouting": "not modelled: gates held"}
