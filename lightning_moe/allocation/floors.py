"""What layers and experts keep at least."""

# E experts

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_moe.allocation.budget import check_count, whole_blocks
from lightning_moe.records import ModelShape


@dataclass(frozen=True, kw_only=True, eq=False)
class Floors:
    """Lower bounds that an allocation respects beside reachability.

    Args:
        layer_floor: Share of its channels that each layer keeps at least, in [0, 1].
        expert_floor: Channels that each expert keeps at least, rounded up to blocks.
        protected: Per layer bool [E]: experts that are never evicted.

    Raises:
        ValueError: a floor is out of range.
    """

    layer_floor: float = 0.0
    expert_floor: int = 0
    protected: Sequence[Tensor] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.layer_floor <= 1:
            raise ValueError(
                f"`layer_floor` is a share of the layer's channels and must be in [0, 1], got {self.layer_floor}."
            )
        check_count(self.expert_floor, name="expert_floor", lowest=0)

    def layer_blocks(self, shape: ModelShape, *, align: int) -> list[int]:
        """Blocks that each layer keeps at least: its share of channels rounded up, at most its whole blocks.

        Examples:
            >>> Floors(layer_floor=0.3).layer_blocks(shape_of([32, 32]), align=16)  # 19.2 of 64 channels, rounded up
            [2]
        """
        return [
            min(math.ceil(self.layer_floor * layer.num_channels / align), whole_blocks(layer, align=align))
            for layer in shape.layers
        ]

    def expert_channels(self, shape: ModelShape, *, least: int) -> list[Tensor]:
        """Channels that each expert keeps at least, int64 [E] per layer; `least` for a protected one."""
        nobody = [torch.zeros(layer.num_experts, dtype=torch.bool) for layer in shape.layers]
        return [torch.clamp(guard_E * least, min=self.expert_floor) for guard_E in self.protected or nobody]
