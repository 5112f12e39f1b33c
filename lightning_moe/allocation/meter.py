"""What a plan takes, in every word a budget may be given in."""

# E experts of a layer; widths are kept channels per expert

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from lightning_moe.allocation.reachability import needed_per_group
from lightning_moe.allocation.units import format_bytes, format_params
from lightning_moe.allocation.usage import active_channels, rerouted, usage_shares
from lightning_moe.quantization.size import ModelSizes, Widths
from lightning_moe.records import CalibrationStatistics, LayerShape, ModelShape


@dataclass(frozen=True, kw_only=True, eq=False)
class Meter:
    """Measures widths.

    Args:
        shape: The model that was calibrated.
        usage: Per layer, the share of tokens routed to each expert [E].
        sizes: Of its files, where known.
    """

    shape: ModelShape
    usage: Sequence[Tensor]
    sizes: ModelSizes | None

    @classmethod
    def of(cls, statistics: CalibrationStatistics, *, sizes: ModelSizes | None, corpora: Sequence[str] | None) -> Self:
        """With the usage that these corpora show."""
        return cls(shape=statistics.shape, usage=usage_shares(statistics, corpora=corpora), sizes=sizes)

    @property
    def whole(self) -> list[tuple[int, ...]]:
        """The widths as they are."""
        return [layer.widths for layer in self.shape.layers]

    def measure(self, name: str, widths: Widths) -> float:
        """One number: `keep_ratio`, `active`, `stored_params`, `active_params` or `bytes`."""
        if name == "keep_ratio":
            return sum(map(sum, widths)) / self.shape.num_channels
        if name == "active":
            left = active_channels(widths, usage=self._rerouted(widths))
            return left / active_channels(self.whole, usage=self.usage)
        assert self.sizes is not None
        if name == "stored_params":
            return self.sizes.stored_params(widths)
        if name == "active_params":
            return self.sizes.active_params(widths, usage=self._rerouted(widths))
        return self.sizes.num_bytes(widths)

    def measure_all(self, widths: Widths) -> dict[str, float]:
        """Every number that is known, by name."""
        sized = ["stored_params", "active_params", "bytes"] if self.sizes is not None else []
        reached = {name: self.measure(name, widths) for name in ["keep_ratio", "active", *sized]}
        return {"prune_ratio": 1 - reached["keep_ratio"], **reached}

    def _rerouted(self, widths: Widths) -> list[Tensor]:
        return rerouted(self.usage, widths=widths, before=self.whole)

    def least(self, *, align: int) -> list[list[int]]:
        """Widths that no plan of blocks of `align` undercuts: one block in each expert that a token needs."""
        return [_least(layer, align=align) for layer in self.shape.layers]


def _least(layer: LayerShape, *, align: int) -> list[int]:
    widths, group_E = [0] * layer.num_experts, layer.group_of_expert.tolist()
    for group in range(layer.num_groups):
        present = [e for e, width in enumerate(layer.widths) if group_E[e] == group and width >= align]
        for expert in present[: needed_per_group(layer)]:
            widths[expert] = align
    return widths


def shown(name: str, value: float) -> str:
    """A limit or what was reached, for people.

    Examples:
        >>> shown("bytes", 11.5e9), shown("stored_params", 3.2e6), shown("active", 0.6)
        ('11.500 GB', '3.200M', '0.6000')
    """
    if name == "bytes":
        return format_bytes(value)
    return format_params(value) if name.endswith("params") else f"{value:.4f}"
