"""Channel baselines of the field: one score, and a rule for how the budget is spread over the layers."""

# L layers

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from lightning_moe.allocation.budget import resolve_align
from lightning_moe.allocation.global_ranking import rank_globally
from lightning_moe.allocation.layer_budgets import rank_in_layers, u_shape
from lightning_moe.allocation.methods.base import PruningMethod, check_block, check_name, check_share
from lightning_moe.allocation.smoothing import check_smoothing, smooth
from lightning_moe.criteria import CHANNEL_CRITERIA
from lightning_moe.records import CalibrationStatistics

LAYER_RULES = ("global", "uniform", "u_shaped", "loss_proportional")


@final
@dataclass(frozen=True, kw_only=True)
class ChannelRanking(PruningMethod):
    """One channel score, one exact budget in blocks, spread over the layers by a rule; no floors, no repair of scores.

    Inside a layer the blocks of all its experts are in one ranking; top-k experts keep at least one block. Presets:
    `wanda`, `magnitude` (`weight_norm`) and `camera` with `uniform` layers, because these scores have another scale in
    every layer and their sources prune layer by layer; `snip` and `taylor` with `global`, because a loss of the
    language model means the same everywhere; `u_shaped` and `loss_proportional` (the field's folklore) by
    `channel_ablation`, to compare the rules with `exact_global`, which has the same score and `global` layers.

    Args:
        criterion: Channel criterion; its source is in its own description.
        layers: How the budget is spread: `global` (one ranking of the model), `uniform` (the same share of every
            layer), `u_shaped` (more at both ends), or `loss_proportional` (shares in proportion to the layer loss
            `sum ||R||^2 q`).
        strength: Of `u_shaped`, in [0, 1]: shares are proportional to `1 + strength * (x^2 - mean x^2)`, x from -1 at
            the first layer to 1 at the last.
        smoothing: Of the layer losses of `loss_proportional`: none, sqrt4, sqrt, log, huber or clip.
        align: Channels of a block; kept widths are multiples of it. If not given: 64 where the widest expert has 512
            channels or more (a multiple of 64), else 16.

    Raises:
        ValueError: a setting is out of range.

    Examples:
        >>> statistics = one_layer(widths=[2, 2], gate_sq_norm=[9, 1, 4, 16])
        >>> method = ChannelRanking(criterion="weight_norm", layers="uniform", align=1)
        >>> method.plan(statistics, prune_ratio=0.5).keep[0].tolist()
        [True, False, False, True]
    """

    criterion: str = "channel_ablation"
    layers: str = "uniform"
    strength: float = 0.5
    smoothing: str = "none"
    align: int | None = None

    name: ClassVar[str] = "channel_ranking"

    def __post_init__(self) -> None:
        check_name(self.criterion, field="criterion", known=CHANNEL_CRITERIA)
        check_name(self.layers, field="layers", known=LAYER_RULES)
        check_share(self.strength, name="strength")
        check_smoothing(self.smoothing)
        check_block(self.align, name="align")

    def keep(
        self, statistics: CalibrationStatistics, *, prune_ratio: float, corpora: Sequence[str] | None
    ) -> tuple[Tensor, ...]:
        """See `rank_globally` and `rank_in_layers`."""
        scores = CHANNEL_CRITERIA[self.criterion](statistics, corpora=corpora)
        align = resolve_align(self.align, shape=statistics.shape)
        if self.layers == "global":
            return rank_globally(scores, prune_ratio=prune_ratio, align=align)
        weight_L = self._weights(statistics, corpora=corpora)
        return rank_in_layers(scores, weight_L=weight_L, prune_ratio=prune_ratio, align=align)

    def _weights(self, statistics: CalibrationStatistics, *, corpora: Sequence[str] | None) -> Tensor:
        num_layers = len(statistics.shape.layers)
        if self.layers == "loss_proportional":
            energy_L = torch.stack([sums["layer_energy"] for sums in statistics.total(corpora)])
            return smooth(energy_L, smoothing=self.smoothing)
        return u_shape(num_layers, strength=self.strength if self.layers == "u_shaped" else 0.0)
