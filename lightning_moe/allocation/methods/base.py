"""What every pruning method is: a frozen object with plain settings that turns statistics into a plan."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, ClassVar, Self

from torch import Tensor

from lightning_moe.allocation.budget import check_count, check_prune_ratio, keep_everything, resolve_align
from lightning_moe.records import CalibrationStatistics, ModelShape, PrunePlan


@dataclass(frozen=True, kw_only=True)
class PruningMethod(ABC):
    """Statistics to plan. A method of your own is a frozen dataclass with `name`, plain fields and `keep`.

    Args:
        align: Kept widths are multiples of this (1 where widths are not touched); None: by the model's widths.
    """

    align: int | None

    name: ClassVar[str]

    @abstractmethod
    def keep(
        self, statistics: CalibrationStatistics, *, prune_ratio: float, corpora: Sequence[str] | None
    ) -> tuple[Tensor, ...]:
        """Per layer bool [C], true for a channel that stays; `prune_ratio` is above 0."""

    def remarks(self, shape: ModelShape, *, prune_ratio: float) -> Mapping[str, str]:
        """What a plan's provenance says beyond settings, corpora and statistics: nothing, unless a method has a say."""
        del shape, prune_ratio
        return {}

    @property
    def settings(self) -> dict[str, Any]:
        """The fields that `build_method(name, **settings)` takes to make this very method again."""
        return {own.name: value for own, value in zip(fields(self), asdict(self).values(), strict=True) if own.init}

    def resolved(self, shape: ModelShape) -> Self:
        """The same method with the `align` and `min_width` that were left open chosen for this model."""
        unset = [name for name, value in asdict(self).items() if name in ("align", "min_width") and value is None]
        return replace(self, **dict.fromkeys(unset, resolve_align(None, shape=shape)))

    def plan(
        self, statistics: CalibrationStatistics, *, prune_ratio: float, corpora: Sequence[str] | None = None
    ) -> PrunePlan:
        """Decides which channels stay; ratio 0 keeps all of them, whatever the settings.

        Args:
            statistics: Of the model to prune.
            prune_ratio: Share of routed-expert channels to remove, in [0, 1); 0 keeps everything.
            corpora: Names of the corpora that count; all when not given.

        Returns:
            The plan.

        Raises:
            ValueError: a ratio out of range, an unknown corpus, or a budget that a layer cannot meet.
        """
        check_prune_ratio(prune_ratio)
        if prune_ratio == 0:
            keep = keep_everything(statistics.shape)
        else:
            keep = self.keep(statistics, prune_ratio=prune_ratio, corpora=corpora)
        provenance = {
            "settings": json.dumps(self.resolved(statistics.shape).settings, sort_keys=True),
            "corpora": ", ".join(statistics.corpora if corpora is None else corpora),
            "statistics": statistics.digest,
        }
        provenance |= self.remarks(statistics.shape, prune_ratio=prune_ratio)
        return PrunePlan(
            shape=statistics.shape,
            method=self.name,
            prune_ratio=prune_ratio,
            align=resolve_align(self.align, shape=statistics.shape),
            keep=keep,
            provenance=provenance,
        )


@dataclass(frozen=True, kw_only=True)
class ExpertMethod(PruningMethod):
    """A method that keeps or drops whole experts: the budget is met to the nearest expert."""

    align: int | None = field(default=1, init=False)

    @property
    def per_layer(self) -> bool:
        """Every layer loses the same share; false where experts of all layers compete for one budget."""
        return True


def check_share(value: float, *, name: str) -> None:
    """Refuses what is not a number in [0, 1].

    Raises:
        ValueError: with the name of the setting and what came.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"`{name}` is a share and must be in [0, 1], got {value!r}.")


def check_block(value: int | None, *, name: str) -> None:
    """Refuses a block size that is neither open (None) nor a whole number >= 1.

    Raises:
        ValueError: with the name of the setting and what came.
    """
    if value is not None:
        check_count(value, name=name, lowest=1)


def check_name(value: str, *, field: str, known: Iterable[str]) -> None:
    """Refuses a name that is not one of `known`.

    Raises:
        ValueError: with the known names.
    """
    if value not in known:
        raise ValueError(f"`{field}` must be one of {list(known)}, got {value!r}.")
