"""What a layer does with its routed pairs, one expert after the other.

T tokens, K experts per token, S = T*K routed pairs sorted by expert, E experts, n channels of an expert, H hidden.
"""

from collections.abc import Container, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_moe.adapters.experts import DoraExperts
from lightning_moe.models.channel_experts import ChannelExperts
from lightning_moe.models.discovery import expert_matrices, expert_widths
from lightning_moe.models.grouped import Routing
from lightning_moe.models.products import product
from lightning_moe.models.routers import without_adapter

# Added to ||y||^2 before dividing by it, as in paper A's loss.
ENERGY_EPSILON = 1e-6


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of the sums over one batch: float64 for a float64 model, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def inverse_energy(output_TH: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """`scale^2 / (||y||^2 + 1e-6)` and `||y||^2`, each `[T]`.

    `scale` is what the block's output is multiplied with before the residual sum (`Family.output_scale`).
    """
    energy_T = torch.linalg.vector_norm(output_TH, dim=-1, dtype=sum_dtype(output_TH.dtype)).square()
    return scale**2 / (energy_T + ENERGY_EPSILON), energy_T


def down_rows(experts: nn.Module, expert: int, *, dtype: torch.dtype) -> Tensor:
    """Transposed down projection of one expert, `[n, H]`; of packed experts nothing else is dequantised."""
    if isinstance(experts, DoraExperts):
        return experts.merged_expert_rows(expert, "down", dtype=dtype)
    if isinstance(experts, ChannelExperts):
        return experts.projection("down_proj").rows(*experts.row_range(expert), dtype)
    return experts.get_parameter("down_proj")[expert].T.to(dtype)


def effective_matrices(experts: nn.Module, expert: int, *, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Gate, up and transposed down projection of one expert, each `[n, H]`; an active adapter merged in (in fp32)."""
    if isinstance(experts, DoraExperts):
        gate_nH, up_nH, down_nH = (
            experts.merged_expert_rows(expert, side, dtype=dtype) for side in ("gate", "up", "down")
        )
        return gate_nH, up_nH, down_nH
    return expert_matrices(experts, expert, dtype=dtype)


@dataclass(frozen=True, kw_only=True)
class RoutedPairs:
    """Routed pairs sorted by expert and, within an expert, by the class of their token.

    The last class is padding: it is computed like the others, but never counted.

    Args:
        routing: the sort; its bounds have one entry per expert and class.
        key_S: `expert * num_classes + class` of each sorted pair.
        gate_S: gate weight of each sorted pair, in the type of the sums.
        num_classes: token classes, padding included.
    """

    routing: Routing
    key_S: Tensor
    gate_S: Tensor
    num_classes: int

    @classmethod
    def sort(
        cls,
        index_TK: Tensor,
        weights_TK: Tensor,
        *,
        class_T: Tensor,
        num_classes: int,
        num_experts: int,
        dtype: torch.dtype,
    ) -> "RoutedPairs":
        """Sorts a batch's pairs; `class_T` is int64, `num_classes - 1` for padding; `dtype` is that of the sums."""
        key_TK = index_TK * num_classes + class_T.unsqueeze(1)
        routing = Routing.sort(key_TK, num_slots=num_experts * num_classes)
        gate_S = weights_TK.reshape(-1)[routing.order_S]
        return cls(
            routing=routing,
            key_S=key_TK.reshape(-1)[routing.order_S],
            gate_S=gate_S.to(dtype),
            num_classes=num_classes,
        )

    @property
    def token_S(self) -> Tensor:  # noqa: N802
        """Token of each sorted pair `[S]`."""
        return self.routing.token_S

    def rows(self, expert: int) -> slice:
        """All sorted pairs of an expert."""
        return self._slice(expert, 0, self.num_classes)

    def counted_rows(self, expert: int) -> slice:
        """The sorted pairs of an expert whose token is not padding: the first ones of its rows."""
        return self._slice(expert, 0, self.num_classes - 1)

    def class_rows(self, expert: int, token_class: int) -> slice:
        """The sorted pairs of an expert whose token is of this class."""
        return self._slice(expert, token_class, token_class + 1)

    def _slice(self, expert: int, first: int, last: int) -> slice:
        bounds, start = self.routing.bounds, expert * self.num_classes
        return slice(bounds[start + first], bounds[start + last])


@dataclass(frozen=True, kw_only=True)
class ExpertPass:
    """One expert on its counted pairs: `a = W_gate x`, `u = W_up x`, `h = act(a) * u`, `z = W_down h`."""

    expert: int
    rows: slice
    input_SH: Tensor
    gate_Sn: Tensor
    up_Sn: Tensor
    hidden_Sn: Tensor
    output_SH: Tensor


def expert_passes(
    experts: nn.Module,
    hidden_TH: Tensor,
    *,
    pairs: RoutedPairs,
    routed_TH: Tensor,
    wanted: Container[int] | None = None,
) -> Iterator[ExpertPass]:
    """Runs the experts on their pairs, adds `g z` to `routed_TH` (in the type of the sums), and shows each expert.

    What belongs to one expert is used up before the next one, so it stays in the processor's cache. The same few
    kernels an expert for stock experts, ChannelExperts and packed ones; under an adapter its weights are those of the
    adapted expert, merged for this pass. An expert without pairs is neither loaded nor
    shown, nor is one that is not in `wanted` where that is given; one with nothing but padding is not shown.
    """
    act_fn = without_adapter(experts).get_submodule("act_fn")
    for expert in range(len(expert_widths(experts))):
        rows, counted = pairs.rows(expert), pairs.counted_rows(expert)
        if rows.start == rows.stop or (wanted is not None and expert not in wanted):
            continue
        gate_nH, up_nH, down_nH = effective_matrices(experts, expert, dtype=hidden_TH.dtype)
        token_S = pairs.token_S[rows]
        input_SH = hidden_TH.index_select(0, token_S)
        gate_Sn, up_Sn = product(input_SH, gate_nH.T), product(input_SH, up_nH.T)
        hidden_Sn = act_fn(gate_Sn) * up_Sn
        output_SH = _constant(experts, expert, num_pairs=len(hidden_Sn))
        output_SH = product(hidden_Sn, down_nH) if output_SH is None else output_SH.to(hidden_Sn.dtype)
        routed_TH.index_add_(0, token_S, output_SH * pairs.gate_S[rows].unsqueeze(1))
        num = counted.stop - counted.start
        if num:
            yield ExpertPass(
                expert=expert,
                rows=counted,
                input_SH=input_SH[:num],
                gate_Sn=gate_Sn[:num],
                up_Sn=up_Sn[:num],
                hidden_Sn=hidden_Sn[:num],
                output_SH=output_SH[:num],
            )


def _constant(experts: nn.Module, expert: int, *, num_pairs: int) -> Tensor | None:
    """The output of a novice, `[S, H]`; None for every other expert."""
    base = without_adapter(experts)
    if not isinstance(base, ChannelExperts) or base.novices is None or expert not in base.novice_experts:
        return None
    return base.novices[base.novice_experts.index(expert)].detach().expand(num_pairs, -1)
