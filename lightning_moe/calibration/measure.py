"""All statistics of one layer in one forward pass (method, section 1).

T tokens, K experts per token, S = T*K routed pairs sorted by expert, E experts, C channels of the layer, n of one
expert, H hidden, B bins of the router entropy (or sequences of a batch, in masks), X any of these.
"""

import math
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_moe.calibration.routed import (
    ExpertPass,
    RoutedPairs,
    down_rows,
    effective_matrices,
    expert_passes,
    inverse_energy,
    sum_dtype,
)
from lightning_moe.models.discovery import expert_widths
from lightning_moe.models.products import product
from lightning_moe.records.statistics import NUM_ENTROPY_BINS, WEIGHT_ABS_SUMS, WEIGHT_NORMS

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
# Terms of a float32 sum of nonnegative numbers that keep its error below 1e-7.
_SHORT_SUM = 256
_NORM_NAMES = (*WEIGHT_NORMS, *WEIGHT_ABS_SUMS)
_MOMENT_NAMES = ("output_sum", "output_sq", "input_sq")
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
        """The entries of the tokens that count: some of the first dimension `[T, ...]`."""
        return value_T if self.index_T is None else value_T.index_select(0, self.index_T)


class OutputBuffer:
    """Memory for the routed outputs of one layer after the other: fresh pages cost more than writing them again."""

    def __init__(self) -> None:
        self._buffer_SH: Tensor | None = None

    def like(self, hidden_TH: Tensor, *, num_pairs: int) -> Tensor:
        """`[S, H]` with anything in it, valid until the next call."""
        size = (num_pairs, hidden_TH.shape[1])
        old = self._buffer_SH
        if old is None or (old.shape, old.dtype, old.device) != (size, hidden_TH.dtype, hidden_TH.device):
            old = self._buffer_SH = hidden_TH.new_empty(size)
        return old


class LayerMeasurement:
    """One layer in one forward pass: keeps its hidden activations from the experts' call to the end of the layer.

    Args:
        experts: stock experts, ChannelExperts or adapted ones.
        tokens: which tokens of the batch count.
        outputs: take the [E, H] and [E, E] sums too, with the routed outputs in this buffer.
    """

    def __init__(self, experts: nn.Module, *, tokens: CountedTokens, outputs: OutputBuffer | None) -> None:
        self.experts = experts
        self.tokens = tokens
        self.outputs = outputs
        self.widths = expert_widths(experts)
        self.offsets = tuple(accumulate(self.widths, initial=0))

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
        self.hidden = self._hidden_buffers(hidden_TH)
        self._start_sums(hidden_TH)
        self.routed_TH = torch.zeros_like(hidden_TH, dtype=self.sum_dtype)
        for one in expert_passes(self.experts, hidden_TH, pairs=self.pairs, routed_TH=self.routed_TH):
            self._take_expert(one)
        if self.outputs is not None:
            gate_TK1, index_TK1 = weights_TK.to(self.sum_dtype).unsqueeze(2), index_TK.unsqueeze(2)
            values = (self.output_SH.view(*index_TK.shape, -1), gate_TK1, index_TK1)
            counted = [self.tokens.select(value_TKX) for value_TKX in values]
            self.sums["output_gram"] = _output_gram(*counted, num_experts=len(self.widths))
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

    def _hidden_buffers(self, like: Tensor) -> dict[int, Tensor]:
        """Where the hidden activations of each expert with counted pairs are kept, `[S, n]`.

        One block of memory: many, each between two experts' temporaries, would keep the allocator from reusing these.
        """
        rows = map(self.pairs.counted_rows, range(len(self.widths)))
        shapes = {expert: (part.stop - part.start, self.widths[expert]) for expert, part in enumerate(rows)}
        shapes = {expert: shape for expert, shape in shapes.items() if shape[0]}
        sizes = [num_pairs * width for num_pairs, width in shapes.values()]
        parts = like.new_empty(sum(sizes)).split(sizes)
        return {expert: part.view(shape) for (expert, shape), part in zip(shapes.items(), parts, strict=True)}

    def _start_sums(self, like: Tensor) -> None:
        num_experts = len(self.widths)
        self.channel_7C = like.new_zeros(len(_CHANNEL_NAMES), self.offsets[-1], dtype=self.sum_dtype)
        self.norm_S = like.new_zeros(len(self.pairs.key_S), dtype=self.sum_dtype)
        self.max_abs_E = like.new_zeros(num_experts, dtype=self.sum_dtype)
        self.sums: dict[str, Tensor] = {}
        if self.outputs is not None:
            self.output_SH = self.outputs.like(like, num_pairs=len(self.pairs.key_S))
            new = partial(like.new_zeros, num_experts, like.shape[1], dtype=self.sum_dtype)
            self.sums = {name: new() for name in _MOMENT_NAMES}

    def _take_expert(self, one: ExpertPass) -> None:
        self.hidden[one.expert].copy_(one.hidden_Sn)
        self._sum_sq(one.gate_Sn, out=self._channels(_GATE, one.expert))
        self._sum_sq(one.up_Sn, out=self._channels(_UP, one.expert))
        torch.linalg.vector_norm(one.output_SH, dim=1, dtype=self.sum_dtype, out=self.norm_S[one.rows])
        self.max_abs_E[one.expert] = torch.maximum(one.output_SH.amax(), -one.output_SH.amin())
        if self.outputs is not None:
            self._take_moments(one)

    def _take_moments(self, one: ExpertPass) -> None:
        self.output_SH.index_copy_(0, self.pairs.routing.order_S[one.rows], one.output_SH)
        torch.sum(one.output_SH, dim=0, dtype=self.sum_dtype, out=self.sums["output_sum"][one.expert])
        self._sum_sq(one.output_SH, out=self.sums["output_sq"][one.expert])
        self._sum_sq(one.input_SH, out=self.sums["input_sq"][one.expert])

    def _take_channels(
        self, expert: int, hidden_Sn: Tensor, weight_3S: Tensor, gate_inverse_S: Tensor, attribution_E: Tensor
    ) -> None:
        """`<R, z>` is the sum of `h_c <R, W_down[:, c]>` over channels: saliency and attribution share one product."""
        rows, start, stop = self.pairs.counted_rows(expert), self.offsets[expert], self.offsets[expert + 1]
        routed_SH = self.routed_TH.index_select(0, self.pairs.token_S[rows]).to(self.dtype)
        projected_Sn = product(routed_SH, down_rows(self.experts, expert, dtype=self.dtype).T)
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
    return torch.full((), float(len(value_T)), dtype=torch.float64, device=value_T.device)


def _output_gram(output_TKH: Tensor, gate_TK1: Tensor, index_TK1: Tensor, *, num_experts: int) -> Tensor:
    """`sum <g_i z_i, g_j z_j>` over the tokens that use both experts, `[E, E]`."""
    gram_TKK = (output_TKH @ output_TKH.mT).double().mul_(gate_TK1 * gate_TK1.mT)
    pair_TKK = index_TK1 * num_experts + index_TK1.mT
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
    # Not bincount: on a GPU it waits for the result.
    histogram_B = entropy_T.new_zeros(NUM_ENTROPY_BINS).index_add_(0, bin_T, torch.ones_like(entropy_T))
    return {"router_probability": probability_TE.sum(0), "entropy_histogram": histogram_B}


def weight_norms(experts: nn.Module) -> dict[str, Tensor]:
    """Squared L2 norm and sum of absolute weights of each channel's gate row, up row and down column.

    Float64 `[C]` on the CPU.
    """
    parameter, widths = next(experts.parameters()), expert_widths(experts)
    dtype = sum_dtype(parameter.dtype)
    # One tensor from the start: small ones between large temporaries would keep the allocator from reusing these.
    norm_6C = torch.empty(len(_NORM_NAMES), sum(widths), dtype=torch.float64, device=parameter.device)
    for expert, part_6n in enumerate(norm_6C.split(widths, dim=1)):
        for index, matrix_nH in enumerate(effective_matrices(experts, expert, dtype=dtype)):
            part_6n[index] = _row_sums(matrix_nH.detach().square())
            part_6n[index + len(WEIGHT_NORMS)] = _row_sums(matrix_nH.detach().abs())
    return dict(zip(_NORM_NAMES, norm_6C.cpu(), strict=True))


def _row_sums(value_nH: Tensor) -> Tensor:
    """Float64 `[n]`; at most `_SHORT_SUM` terms at a time in the values' own type (error 5e-8), seven times faster."""
    return torch.stack([part_nh.sum(1) for part_nh in value_nH.split(_SHORT_SUM, dim=1)]).sum(0, dtype=torch.float64)
