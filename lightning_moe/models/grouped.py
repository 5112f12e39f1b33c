"""Routing and grouped matrix products: the arithmetic every experts module here is made of.

T tokens, K experts per token, S = T*K routed pairs sorted by expert, G experts of equal width, n channels, H hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Routed pairs sorted by expert slot; made once per layer and call.

    Args:
        order_S: position of each sorted pair in the flattened `[T, K]` indices.
        token_S: token of each sorted pair.
        bounds: `num_slots + 1` offsets into the sorted pairs (one host sync a layer).
    """

    order_S: Tensor
    token_S: Tensor
    bounds: tuple[int, ...]

    @classmethod
    def sort(cls, slot_TK: Tensor, *, num_slots: int) -> "Routing":
        """Sorts the pairs of `slot_TK` (int64, values in [0, num_slots)) by slot, stably."""
        slot_S = slot_TK.reshape(-1)
        order_S = slot_S.argsort(stable=True)
        ends = torch.bincount(slot_S, minlength=num_slots).cumsum(0)
        return cls(order_S=order_S, token_S=order_S // slot_TK.shape[1], bounds=(0, *ends.tolist()))

    def combine(self, output_SH: Tensor, weights_TK: Tensor) -> Tensor:
        """Weights the sorted outputs and adds each token's K: `[S, H] -> [T, H]` (no atomic adds: deterministic).

        Routers that give fp32 weights get fp32 products and sums, as in the stock experts.
        """
        num_tokens, top_k = weights_TK.shape
        weighted_SH = output_SH * weights_TK.reshape(-1)[self.order_S].unsqueeze(-1)
        inverse_S = torch.empty_like(self.order_S)
        inverse_S[self.order_S] = torch.arange(len(inverse_S), device=inverse_S.device)
        return weighted_SH[inverse_S].view(num_tokens, top_k, output_SH.shape[1]).sum(1)


def grouped_matmul(input_Sk: Tensor, weight_Gkn: Tensor, bounds: tuple[int, ...]) -> Tensor:
    """Rows `bounds[g]:bounds[g+1]` of the input times matrix g: `[S, k] x [G, k, n] -> [S, n]`.

    One call of `torch.nn.functional.grouped_mm` where its alignment (16 bytes) and types allow, else a loop of mm. The
    width of the output counts too: it is the row stride of the gradient that backward multiplies.
    """
    if len(bounds) == 2:
        return input_Sk @ weight_Gkn[0]
    rows_fit = weight_Gkn.shape[2] * weight_Gkn.element_size() % 16 == 0
    if rows_fit and _aligned(input_Sk) and _aligned(weight_Gkn) and input_Sk.dtype == weight_Gkn.dtype:
        return functional.grouped_mm(input_Sk, weight_Gkn, offs=_offsets(bounds, input_Sk))
    return torch.cat([input_Sk[a:b] @ weight_Gkn[g] for g, (a, b) in enumerate(pairwise(bounds))])


def grouped_outer(left_Sm: Tensor, right_Sn: Tensor, bounds: tuple[int, ...]) -> Tensor:
    """Per group `left^T right` over its own rows: `[S, m], [S, n] -> [G, m, n]` (a weight gradient)."""
    if len(bounds) == 2:
        return (left_Sm.T @ right_Sn).unsqueeze(0)
    left_mS = left_Sm.T
    if _aligned(left_mS) and _aligned(right_Sn) and left_Sm.dtype == right_Sn.dtype:
        return functional.grouped_mm(left_mS, right_Sn, offs=_offsets(bounds, left_Sm))
    return torch.stack([left_Sm[a:b].T @ right_Sn[a:b] for a, b in pairwise(bounds)])


class FrozenGroupedMatmul(torch.autograd.Function):
    """`grouped_matmul` with a frozen weight that is loaded anew in backward, so no dense copy outlives the call."""

    @staticmethod
    def forward(ctx: Any, input_Sk: Tensor, load_Gkn: Callable[[], Tensor], bounds: tuple[int, ...]) -> Tensor:
        """`load_Gkn` returns the weight `[G, k, n]`, for example by dequantising it."""
        ctx.load_Gkn, ctx.bounds = load_Gkn, bounds
        return grouped_matmul(input_Sk, load_Gkn(), bounds)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Gradient of the input only."""
        return grouped_matmul(grads[0].contiguous(), ctx.load_Gkn().transpose(1, 2), ctx.bounds), None, None


def _aligned(tensor: Tensor) -> bool:
    """Whether grouped_mm takes this operand: a supported type, all strides 16 bytes wide but a single unit one."""
    if tensor.dtype not in _GROUPED_DTYPES or tensor.data_ptr() % 16:
        return False
    narrow = [stride for stride in tensor.stride() if stride * tensor.element_size() % 16]
    return len(narrow) <= 1 and all(stride == 1 for stride in narrow)


def _offsets(bounds: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.tensor(bounds[1:], dtype=torch.int32, device=like.device)
