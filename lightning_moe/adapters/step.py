"""The adapted experts of a layer as one differentiable function: forward and backward by hand, run after run.

Of a run only the three projections' outputs and reductions `x A^T` are kept. In backward the input is gathered and the
weights are dequantised again, `act(gate) * up` is recomputed, and each stacked gradient is written in its place.

T tokens, K experts per token, S routed pairs sorted by expert, G experts of a run (one on a CPU unless they are small,
a whole width on a GPU), n channels, H hidden, r rank; i and o are inputs and outputs of a projection.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_moe.adapters.functional import (
    Gradients,
    LowRank,
    Projected,
    adapted_norm,
    frozen_products,
    project,
    pull_back,
    safe_norm,
    scaled_gradient,
    write_low_rank_gradients,
    write_magnitude_gradient,
)
from lightning_moe.adapters.norms import NormCache
from lightning_moe.models.grouped import ExpertRun, Routing, WidthGroup

SIDES = ("gate", "up", "down")
# Tensors with one entry per channel; the others have one per expert.
PER_CHANNEL = frozenset(
    {"lora_A_down", *(f"{kind}_{side}" for kind in ("lora_B", "lora_magnitude", "base_sq") for side in ("gate", "up"))}
)
_KEPT = len(Projected._fields)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A run of neighbouring experts of one width, and where its parts are.

    Args:
        width: n.
        bounds: offsets of each expert's pairs in the run's own pairs, `[G + 1]`.
        pairs: the run's pairs among the sorted pairs.
        slots: its experts, in storage order.
        rows: its channels, in storage order.
    """

    width: int
    bounds: tuple[int, ...]
    pairs: slice
    slots: slice
    rows: slice

    @classmethod
    def of_run(cls, group: WidthGroup, run: ExpertRun) -> "Piece":
        """Where a run of a width group is."""
        slot, row = group.first_slot + run.first, group.first_row + run.first * run.width
        return cls(
            width=run.width,
            bounds=run.bounds,
            pairs=slice(run.start, run.stop),
            slots=slice(slot, slot + run.num_experts),
            rows=slice(row, row + run.num_experts * run.width),
        )

    @property
    def experts(self) -> range:
        """Its slots as numbers."""
        return range(self.slots.start, self.slots.stop)

    def of(self, name: str, stacked: Tensor) -> Tensor:
        """The run's part of a stacked tensor as `[G, ...]`, a view."""
        if name not in PER_CHANNEL:
            return stacked[self.slots]
        return stacked[self.rows].view(len(self.experts), self.width, *stacked.shape[1:])

    def low_rank(self, side: str, tensors: Mapping[str, Tensor]) -> LowRank:
        """The run's part of one projection's adapter."""
        parts = self.gradients(side, tensors)
        assert parts.A_Gri is not None
        assert parts.B_Gor is not None
        return LowRank(parts.A_Gri, parts.B_Gor, parts.magnitude_Go)

    def gradients(self, side: str, into: Mapping[str, Tensor]) -> Gradients:
        """The run's part of one projection's gradients; what is not there is None."""
        names = (f"lora_A_{side}", f"lora_B_{side}", f"lora_magnitude_{side}")
        A, B, magnitude = (self.of(name, into[name]) if name in into else None for name in names)
        return Gradients(A if A is None or side != "down" else A.transpose(1, 2), B, magnitude)


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of an adapted layer.

    Args:
        routing: the sorted pairs.
        slot_S: slot of each of them.
        pieces: the runs.
        names: of the adapter's tensors, in the order in which autograd gets them.
        scaling: s.
        dtype: type of the matrix products.
        act_fn: activation of the gate.
        load_Gio: frozen weights of one projection of a run, in the asked-for type.
        norms: of the adapted weights, filled where they are not known; unused under plain LoRA.
        base_sq: squared norms of the base's outputs, by projection.
    """

    routing: Routing
    slot_S: Tensor
    pieces: Sequence[Piece]
    names: Sequence[str]
    scaling: float
    dtype: torch.dtype
    act_fn: nn.Module
    load_Gio: Callable[[Piece, str, torch.dtype], Tensor]
    norms: NormCache
    base_sq: Mapping[str, Tensor]

    @property
    def wide(self) -> torch.dtype:
        """Type of everything but the matrix products: at least 32 bit."""
        return torch.promote_types(self.dtype, torch.float32)

    def new_gradient(self, stacked: Tensor) -> Tensor:
        """Where a gradient goes, in its shape: zeros where some expert has no pairs, else to be written one by one."""
        all_hit = sum(len(piece.experts) for piece in self.pieces) == len(self.base_sq["down"])
        return torch.empty_like(stacked) if all_hit else torch.zeros_like(stacked)

    def pair_weights(self, weights_TK: Tensor) -> Tensor:
        """The router's weight of each sorted pair `[S]`."""
        return weights_TK.reshape(-1)[self.routing.order_S].to(self.wide)

    def expert_of_pair(self, piece: Piece) -> Tensor | None:
        """Expert of each pair of a run `[S]`, counted from its first one; None where there is only one."""
        return None if len(piece.experts) == 1 else self.slot_S[piece.pairs] - piece.slots.start

    def gather(self, piece: Piece, hidden_TH: Tensor) -> Tensor:
        """The hidden states of a run's pairs `[S, H]` in the type of the products."""
        return hidden_TH.index_select(0, self.routing.token_S[piece.pairs]).to(self.dtype)


def adapted_experts(call: Call, hidden_TH: Tensor, weights_TK: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """The routed pairs' outputs, weighted and summed: `[T, H]`; differentiable in hidden, weights and the adapter.

    Pairs are added to their tokens in the order of the runs. On a GPU the pairs of one run are added atomically, so the
    last bits may differ from call to call unless `torch.use_deterministic_algorithms(True)` is set.
    """
    inputs = (hidden_TH, weights_TK, *(tensors[name] for name in call.names))
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        return AdaptedExperts.apply(call, *inputs)  # pyright: ignore[reportReturnType]
    with torch.no_grad():
        return _forward(call, hidden_TH, weights_TK, tensors, kept=None)


class AdaptedExperts(torch.autograd.Function):
    """`adapted_experts` with its backward; the adapter's tensors come in the order of `call.names`."""

    @staticmethod
    def forward(ctx: Any, call: Call, hidden_TH: Tensor, weights_TK: Tensor, *adapter: Tensor) -> Tensor:
        """The routed sum `[T, H]`; keeps the inputs, and of each run its three `Projected`."""
        kept: list[Tensor | None] = []
        output_TH = _forward(call, hidden_TH, weights_TK, dict(zip(call.names, adapter, strict=True)), kept=kept)
        ctx.call = call
        ctx.save_for_backward(hidden_TH, weights_TK, *adapter, *kept)
        return output_TH

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]: the decorator hides the names
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Gradients of hidden, weights and the adapter, in their shapes; experts without a pair get zeros."""
        call: Call = ctx.call
        hidden_TH, weights_TK, *saved = ctx.saved_tensors
        tensors = dict(zip(call.names, saved, strict=False))
        needed = dict(zip(call.names, ctx.needs_input_grad[3:], strict=True))
        backward = _Backward(
            call=call,
            hidden_TH=hidden_TH,
            grad_TH=grads[0].to(call.wide),
            weight_S=call.pair_weights(weights_TK),
            tensors=tensors,
            grad_hidden_TH=torch.zeros_like(hidden_TH, dtype=call.wide) if ctx.needs_input_grad[1] else None,
            grad_weight_S=torch.zeros(weights_TK.numel(), dtype=call.wide, device=hidden_TH.device),
            into={name: call.new_gradient(tensors[name]) for name in call.names if needed[name]},
        )
        kept = iter(saved[len(call.names) :])
        with torch.autocast(hidden_TH.device.type, enabled=False):
            for piece in call.pieces:
                backward.run(piece, *(Projected(*(next(kept) for _ in range(_KEPT))) for _ in SIDES))
        return None, *backward.of_inputs(weights_TK), *(backward.into.get(name) for name in call.names)


def _forward(
    call: Call,
    hidden_TH: Tensor,
    weights_TK: Tensor,
    tensors: Mapping[str, Tensor],
    *,
    kept: list[Tensor | None] | None,
) -> Tensor:
    weight_S = call.pair_weights(weights_TK)
    output_TH = torch.zeros_like(hidden_TH, dtype=call.wide)
    for piece in call.pieces:
        input_SH = call.gather(piece, hidden_TH)
        gate, up = (_project(call, piece, side, input_SH, tensors) for side in ("gate", "up"))
        input_Sn = (call.act_fn(gate.output_So) * up.output_So).to(call.dtype)
        down = _project(call, piece, "down", input_Sn, tensors)
        call.norms.learn(piece.experts)
        weighted_SH = down.output_So * weight_S[piece.pairs].unsqueeze(1)
        output_TH.index_add_(0, call.routing.token_S[piece.pairs], weighted_SH)
        if kept is not None:
            if down.scale_Go is None:  # only the magnitude's gradient asks for these outputs
                down = down._replace(output_So=down.output_So.new_empty(0))
            for output_So, reduced_Sr, scale_Go in (gate, up, down):
                kept += [output_So.to(call.dtype), reduced_Sr, scale_Go]
    return output_TH.to(hidden_TH.dtype)


def _project(call: Call, piece: Piece, side: str, input_Si: Tensor, tensors: Mapping[str, Tensor]) -> Projected:
    adapter, weight_Gio = piece.low_rank(side, tensors), call.load_Gio(piece, side, call.dtype)
    unknown = adapter.magnitude_Go is not None and not call.norms.knows(piece.experts)
    frozen_So, product_Gro = frozen_products(input_Si, weight_Gio, adapter.A_Gri if unknown else None, piece.bounds)
    scale_Go = _scale(call, piece, side, adapter, product_Gro)
    expert_S = call.expert_of_pair(piece)
    return project(input_Si, frozen_So, adapter, scale_Go, scaling=call.scaling, bounds=piece.bounds, expert_S=expert_S)


def _scale(call: Call, piece: Piece, side: str, adapter: LowRank, product_Gro: Tensor | None) -> Tensor | None:
    """`m / norm`; the norm is computed where `A W^T` is given, and else known."""
    if adapter.magnitude_Go is None:
        return None
    name = f"base_sq_{side}"
    norm_Go = piece.of(name, call.norms.norms[side])
    if product_Gro is not None:
        base_sq_Go = piece.of(name, call.base_sq[side])
        norm_Go.copy_(adapted_norm(product_Gro, adapter.A_Gri, adapter.B_Gor, base_sq_Go, call.scaling))
    return (adapter.magnitude_Go / safe_norm(norm_Go)).to(call.wide)


@dataclass(frozen=True, kw_only=True)
class _Backward:
    """What the runs share in backward, and where they put their gradients."""

    call: Call
    hidden_TH: Tensor
    grad_TH: Tensor
    weight_S: Tensor
    tensors: Mapping[str, Tensor]
    grad_hidden_TH: Tensor | None
    grad_weight_S: Tensor
    into: Mapping[str, Tensor]

    def run(self, piece: Piece, gate: Projected, up: Projected, down: Projected) -> None:
        """One run: down, activation, then gate and up."""
        call, token_S = self.call, self.call.routing.token_S[piece.pairs]
        gate_Sn, up_Sn = gate.output_So.to(call.wide), up.output_So.to(call.wide)
        with torch.enable_grad():
            leaf_Sn = gate_Sn.detach().requires_grad_()
            activated_Sn = call.act_fn(leaf_Sn)
        product_Sn = activated_Sn.detach() * up_Sn
        grad_Sn = self._down(piece, down, product_Sn, self.grad_TH.index_select(0, token_S))
        (grad_gate_Sn,) = torch.autograd.grad(activated_Sn, leaf_Sn, grad_Sn * up_Sn)
        input_SH = call.gather(piece, self.hidden_TH)
        from_gate_SH = self._side(piece, "gate", gate, input_SH, grad_gate_Sn)
        from_up_SH = self._side(piece, "up", up, input_SH, grad_Sn.mul_(activated_Sn.detach()))
        if self.grad_hidden_TH is not None and from_gate_SH is not None and from_up_SH is not None:
            self.grad_hidden_TH.index_add_(0, token_S, from_gate_SH.add_(from_up_SH).to(call.wide))

    def _down(self, piece: Piece, down: Projected, product_Sn: Tensor, grad_SH: Tensor) -> Tensor:
        """Gradient of `act(gate) * up`, and of the router's weights.

        The router's weight multiplies the few numbers of the channels and of the rank rather than those of the outputs.
        """
        call, weight_S = self.call, self.weight_S[piece.pairs]
        adapter, into = piece.low_rank("down", self.tensors), piece.gradients("down", self.into)
        write_magnitude_gradient(into, adapter, grad_SH, down.output_So, weight_S, piece.bounds)
        scaled_SH = scaled_gradient(grad_SH, down.scale_Go, call.expert_of_pair(piece), dtype=call.dtype)
        weight_Gio = call.load_Gio(piece, "down", call.dtype)
        grad_reduced_Sr, grad_Sn = pull_back(scaled_SH, weight_Gio, adapter, scaling=call.scaling, bounds=piece.bounds)
        assert grad_Sn is not None
        weight_S1 = weight_S.unsqueeze(1).to(call.dtype)
        reduced_Sr, grad_reduced_Sr = down.reduced_Sr * (call.scaling * weight_S1), grad_reduced_Sr * weight_S1
        write_low_rank_gradients(into, product_Sn.to(call.dtype), reduced_Sr, scaled_SH, grad_reduced_Sr, piece.bounds)
        grad_Sn = grad_Sn.to(call.wide)
        self.grad_weight_S[piece.pairs] = (grad_Sn * product_Sn).sum(1)
        return grad_Sn.mul_(weight_S.unsqueeze(1))

    def _side(self, piece: Piece, side: str, saved: Projected, input_SH: Tensor, grad_Sn: Tensor) -> Tensor | None:
        """Gradient of the input through gate or up, where it is needed."""
        call = self.call
        adapter, into = piece.low_rank(side, self.tensors), piece.gradients(side, self.into)
        write_magnitude_gradient(into, adapter, grad_Sn, saved.output_So, None, piece.bounds)
        scaled_Sn = scaled_gradient(grad_Sn, saved.scale_Go, call.expert_of_pair(piece), dtype=call.dtype)
        weight_Gio = None if self.grad_hidden_TH is None else call.load_Gio(piece, side, call.dtype)
        grad_reduced_Sr, grad_SH = pull_back(scaled_Sn, weight_Gio, adapter, scaling=call.scaling, bounds=piece.bounds)
        reduced_Sr = saved.reduced_Sr * call.scaling
        write_low_rank_gradients(into, input_SH, reduced_Sr, scaled_Sn, grad_reduced_Sr, piece.bounds)
        return grad_SH

    def of_inputs(self, weights_TK: Tensor) -> tuple[Tensor | None, Tensor]:
        """Gradients of the hidden states and of the router's weights."""
        grad_weights = torch.empty_like(self.grad_weight_S)
        grad_weights[self.call.routing.order_S] = self.grad_weight_S
        hidden = None if self.grad_hidden_TH is None else self.grad_hidden_TH.to(self.hidden_TH.dtype)
        return hidden, grad_weights.view(weights_TK.shape).to(weights_TK.dtype)
