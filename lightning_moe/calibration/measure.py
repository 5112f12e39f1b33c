"""All statistics of one layer in one forward pass (method, section 1).

T tokens, K experts per token, S = T*K routed pairs sorted by expert, E experts, C channels of the layer, n of one
expert, H hidden, B bins of the router entropy.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_moe.calibration.routed import (
    ExpertPass,
    RoutedPairs,
    down_rows,
    expert_passes,
    inverse_energy,
    sum_dtype,
)
from lightning_moe.models.discovery import expert_matrices, expert_widths
from lightning_moe.records.statistics import NUM_ENTROPY_BINS

_COUNTED, _PADDING, _NUM_CLASSES = 0, 1, 2
# Rows of the channel sums: first the three that are one product of weights and h^2.
_CHANNEL_NAMES = (
    "hidden_sq",
    "weighted_sq",
    "channel_ablation",
    "channel_saliency",
    "max_weighted_sq",
    "gate_sq",
    "up_sq",
)
_SALIENCY, _MAX, _GATE, _UP = 3, 4, 5, 6
_PAIR_NAMES = ("count", "gate_weight", "norm", "sq_norm", "weighted_norm", "ablation")


@dataclass(frozen=True, kw_only=True)
class CountedTokens:
    """Which tokens of a batch count.

    Args:
        is_padding_T: true for a token that does not.
        index_T: the tokens that do; all of them when not given.
    """

    is_padding_T: Tensor
    index_T: Tensor | None

    @classmethod
    def from_mask(cls, attention_mask: Tensor | None, *, num_tokens: int, device: torch.device) -> "CountedTokens":
        """Tokens of a `[B, S]` mask (0 = padding), or all; one host sync a batch, none a layer."""
        if attention_mask is None:
            return cls(is_padding_T=torch.zeros(num_tokens, dtype=torch.bool, device=device), index_T=None)
        is_padding_T = attention_mask.reshape(-1).to(device) == 0
        index_T = torch.nonzero(~is_padding_T).flatten()
        return cls(is_padding_T=is_padding_T, index_T=None if len(index_T) == num_tokens else index_T)

    def select(self, value_T: Tensor) -> Tensor:
        """The entries of the tokens that count, first dimension."""
        return value_T if self.index_T is None else value_T.index_select(0, self.index_T)


class LayerMeasurement:
    """One layer in one forward pass: keeps its routed activations from the experts' call to the end of the layer.

    Args:
        experts: stock experts or ChannelExperts.
        tokens: which tokens of the batch count.
        moments: take the [E, H] and [E, E] sums too.
    """

    def __init__(self, experts: nn.Module, *, tokens: CountedTokens, moments: bool) -> None:
        self.experts = experts
        self.tokens = tokens
        self.moments = moments
        self.widths = expert_widths(experts)
        self.offsets = tuple(accumulate(self.widths, initial=0))
        self.hidden: dict[int, Tensor] = {}

    def run(self, hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The experts' output `[T, H]`, as the experts themselves would give it; takes all that does not need q."""
        self.dtype, self.sum_dtype = hidden_TH.dtype, sum_dtype(hidden_TH.dtype)
        self.pairs = RoutedPairs.sort(
            index_TK,
            weights_TK,
            class_T=self.tokens.is_padding_T.to(index_TK.dtype),
            num_classes=_NUM_CLASSES,
            num_experts=len(self.widths),
            dtype=self.sum_dtype,
        )
        self._start_sums(hidden_TH)
        output_SH = hidden_TH.new_empty(len(self.pairs.key_S), hidden_TH.shape[-1])
        for one in expert_passes(self.experts, hidden_TH, pairs=self.pairs, output_SH=output_SH):
            self._take_expert(one)
        self._take_outputs(output_SH)
        weighted_TKH = self.pairs.by_token(output_SH.mul_(self.pairs.gate_S.to(self.dtype).unsqueeze(1)))
        if self.moments:
            self.sums["output_gram"] = _output_gram(
                self.tokens.select(weighted_TKH), self.tokens.select(index_TK), num_experts=len(self.widths)
            )
        self.routed_TH = weighted_TKH.sum(1, dtype=self.sum_dtype)
        return self.routed_TH.to(self.dtype)

    def finish(self, output_TH: Tensor, *, scale: float) -> dict[str, Tensor]:
        """All sums of the layer, given the decoder layer's output; NaN or infinity there is NaN or infinity here."""
        inverse_T, energy_T = inverse_energy(output_TH, scale=scale)
        inverse_S = inverse_T[self.pairs.token_S]
        gate_S = self.pairs.gate_S
        weight_3S = torch.stack([torch.ones_like(gate_S), gate_S.square(), gate_S.square() * inverse_S])
        attribution_E = gate_S.new_zeros(len(self.widths))
        for expert, hidden_Sn in self.hidden.items():
            self._take_channels(expert, hidden_Sn, weight_3S, gate_S * inverse_S, attribution_E)
        layer_T = torch.linalg.vector_norm(self.routed_TH, dim=-1).square() * inverse_T
        # An infinite output would make q zero: it must not pass for a layer that has no effect.
        layer_T = layer_T + 0.0 * energy_T
        layer_T = self.tokens.select(layer_T)
        self.sums |= dict(zip(_CHANNEL_NAMES, self.channel_7C, strict=True))
        self.sums |= self._pair_sums(inverse_S) | {"attribution": attribution_E}
        return self.sums | {"layer_energy": layer_T.sum(), "num_tokens": _count(layer_T)}

    def _start_sums(self, like: Tensor) -> None:
        new = like.new_zeros
        self.channel_7C = new(len(_CHANNEL_NAMES), self.offsets[-1], dtype=self.sum_dtype)
        self.sums: dict[str, Tensor] = {}
        if self.moments:
            names = ("output_sum", "output_sq", "input_sq")
            self.sums = {name: new(len(self.widths), like.shape[-1], dtype=self.sum_dtype) for name in names}

    def _take_expert(self, one: ExpertPass) -> None:
        self.hidden[one.expert] = one.hidden_Sn
        self._sum_sq(one.gate_Sn, out=self._channels(_GATE, one.expert))
        self._sum_sq(one.up_Sn, out=self._channels(_UP, one.expert))
        if self.moments:
            torch.sum(one.output_SH, dim=0, dtype=self.sum_dtype, out=self.sums["output_sum"][one.expert])
            self._sum_sq(one.output_SH, out=self.sums["output_sq"][one.expert])
            self._sum_sq(one.input_SH, out=self.sums["input_sq"][one.expert])

    def _take_outputs(self, output_SH: Tensor) -> None:
        self.norm_S = torch.linalg.vector_norm(output_SH, dim=1, dtype=self.sum_dtype)
        largest_S = output_SH.abs().amax(1).to(self.sum_dtype)
        largest = largest_S.new_zeros(len(self.widths) * _NUM_CLASSES)
        largest.scatter_reduce_(0, self.pairs.key_S, largest_S, "amax")
        self.max_abs_E = largest[_COUNTED::_NUM_CLASSES]

    def _take_channels(
        self, expert: int, hidden_Sn: Tensor, weight_3S: Tensor, gate_inverse_S: Tensor, attribution_E: Tensor
    ) -> None:
        """`<R, z>` is the sum of `h_c <R, W_down[:, c]>` over channels: saliency and attribution share one product."""
        rows, start, stop = self.pairs.counted_rows(expert), self.offsets[expert], self.offsets[expert + 1]
        routed_SH = self.routed_TH.index_select(0, self.pairs.token_S[rows]).to(self.dtype)
        projected_Sn = routed_SH @ down_rows(self.experts, expert, dtype=self.dtype).T
        hidden_Sn = hidden_Sn.to(self.sum_dtype)
        aligned_Sn = hidden_Sn * projected_Sn
        attribution_E[expert] = (gate_inverse_S[rows] @ aligned_Sn).sum()
        self.channel_7C[_SALIENCY, start:stop] = gate_inverse_S[rows] @ aligned_Sn.abs_()
        square_Sn = hidden_Sn.square()
        self.channel_7C[:_SALIENCY, start:stop] = weight_3S[:, rows] @ square_Sn
        torch.amax(square_Sn.mul_(weight_3S[1, rows].unsqueeze(1)), dim=0, out=self._channels(_MAX, expert))

    def _pair_sums(self, inverse_S: Tensor) -> dict[str, Tensor]:
        gate_S, norm_S = self.pairs.gate_S, self.norm_S
        square_S = norm_S.square()
        values = (
            torch.ones_like(gate_S),
            gate_S,
            norm_S,
            square_S,
            gate_S * norm_S,
            gate_S.square() * square_S * inverse_S,
        )
        value_S6 = torch.stack(values, dim=1).double()
        total = value_S6.new_zeros(len(self.widths) * _NUM_CLASSES, len(values))
        total_6E = total.index_add_(0, self.pairs.key_S, value_S6)[_COUNTED::_NUM_CLASSES].T
        return dict(zip(_PAIR_NAMES, total_6E, strict=True)) | {"max_abs": self.max_abs_E}

    def _channels(self, row: int, expert: int) -> Tensor:
        return self.channel_7C[row, self.offsets[expert] : self.offsets[expert + 1]]

    def _sum_sq(self, value_Sn: Tensor, *, out: Tensor) -> None:
        # On a CPU ten times faster than a norm over the first dimension.
        torch.sum(value_Sn.to(self.sum_dtype).square(), dim=0, out=out)


def _count(value_T: Tensor) -> Tensor:
    return torch.tensor(float(len(value_T)), dtype=torch.float64, device=value_T.device)


def _output_gram(weighted_TKH: Tensor, index_TK: Tensor, *, num_experts: int) -> Tensor:
    """`sum <g_i z_i, g_j z_j>` over the tokens that use both experts, `[E, E]`."""
    gram_TKK = (weighted_TKH @ weighted_TKH.mT).double()
    pair_TKK = index_TK.unsqueeze(2) * num_experts + index_TK.unsqueeze(1)
    total = gram_TKK.new_zeros(num_experts * num_experts)
    return total.index_add_(0, pair_TKK.reshape(-1), gram_TKK.reshape(-1)).view(num_experts, num_experts)


def router_sums(logits_TE: Tensor, *, score: Literal["softmax", "sigmoid"]) -> dict[str, Tensor]:
    """Router probabilities summed over these tokens `[E]`, and a histogram of their entropy over [0, log E] `[B]`.

    Sigmoid scores are divided by their sum over the experts.
    """
    logits_TE = logits_TE.to(sum_dtype(logits_TE.dtype))
    if score == "softmax":
        probability_TE = logits_TE.softmax(-1)
    else:
        score_TE = logits_TE.sigmoid()
        probability_TE = score_TE / score_TE.sum(-1, keepdim=True)
    highest = max(math.log(logits_TE.shape[1]), torch.finfo(torch.float32).tiny)
    entropy_T = torch.special.entr(probability_TE).sum(-1) / highest
    bin_T = (entropy_T * NUM_ENTROPY_BINS).nan_to_num().long().clamp_(0, NUM_ENTROPY_BINS - 1)
    histogram_B = torch.bincount(bin_T, minlength=NUM_ENTROPY_BINS)
    return {"router_probability": probability_TE.sum(0), "entropy_histogram": histogram_B}


def weight_norms(experts: nn.Module) -> dict[str, Tensor]:
    """Squared L2 norms of each channel's gate row, up row and down column: float64 `[C]` on the CPU."""
    norms: Sequence[list[Tensor]] = ([], [], [])
    for expert in range(len(expert_widths(experts))):
        for values, matrix_nH in zip(norms, expert_matrices(experts, expert, dtype=torch.float64), strict=True):
            values.append(matrix_nH.detach().square().sum(1).cpu())
    names = ("gate_sq_norm", "up_sq_norm", "down_sq_norm")
    return {name: torch.cat(values) for name, values in zip(names, norms, strict=True)}
