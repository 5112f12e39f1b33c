"""DoRA on the rows of one width group, as one differentiable grouped product.

For one expert with weight W [o, i], adapter A [r, i], B [o, r], magnitude m [o] and scaling s (Liu et al. 2024, DoRA;
method.md section 6), `y = m / ||W + s B A||_row * (x W^T + s (x A^T) B^T)`, where the norm is a constant in backward.

S routed pairs sorted by expert, G experts of equal width n, H hidden, r rank; i and o are the input and output sizes of
the projection (H and n for gate and up, n and H for down).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_moe.models.channel_experts import RowStorage
from lightning_moe.models.grouped import grouped_matmul, grouped_outer

# Left operand of a sum over tokens: eight columns keep the rows 16 bytes wide in every type.
_ONES_WIDTH = 8


@dataclass(frozen=True, kw_only=True)
class RowBlock:
    """The frozen rows `[G, n, H]` of the experts of one width, read (and dequantised) anew each time.

    Args:
        storage: dense or packed rows of the whole layer.
        start: first row of the block.
        num_experts: G.
        width: n.
        rows_are_outputs: rows are output channels (gate, up); otherwise they are input channels (down).
    """

    storage: RowStorage
    start: int
    num_experts: int
    width: int
    rows_are_outputs: bool

    def load(self, dtype: torch.dtype) -> Tensor:
        """Rows `[G, n, H]`: a view of the storage where that is dense and of this type."""
        stop = self.start + self.num_experts * self.width
        return self.storage.rows(self.start, stop, dtype).view(self.num_experts, self.width, self.storage.shape[1])

    def orient(self, rows_GnH: Tensor) -> Tensor:
        """The same rows as matrices `[G, i, o]` (a view)."""
        return rows_GnH.transpose(1, 2) if self.rows_are_outputs else rows_GnH

    def load_scaled(self, dtype: torch.dtype, scale_Go: Tensor | None) -> Tensor:
        """The matrices `[G, i, o]` with every output multiplied by its scale, which is done in 32 bit."""
        if scale_Go is None:
            return self.orient(self.load(dtype))
        return self.orient(self.scale(self.load(_at_least_fp32(dtype)), scale_Go)).to(dtype)

    def scale(self, rows_GnH: Tensor, scale_Go: Tensor) -> Tensor:
        """Loaded rows with every output multiplied by its scale; in place where they were made by dequantising."""
        factor = scale_Go.unsqueeze(-1 if self.rows_are_outputs else 1)
        return rows_GnH.mul_(factor) if self.storage.packed else rows_GnH * factor


def squared_norms(block: RowBlock) -> Tensor:
    """`||W_o||^2` over the inputs: fp32 `[G, o]`."""
    return block.orient(block.load(torch.float32).detach()).pow(2).sum(1)


def adapted_norm(weight_Gio: Tensor, A_Gri: Tensor, B_Gor: Tensor, base_sq_Go: Tensor, scaling: float) -> Tensor:
    """`||W + s B A||` of every output without a dense `B A`: `[G, o]`.

    `||W_o + s (BA)_o||^2 = ||W_o||^2 + 2 s (W A^T)_o . B_o + s^2 B_o (A A^T) B_o^T`, method.md section 6.
    """
    product_Gor = torch.bmm(A_Gri.to(weight_Gio.dtype), weight_Gio).transpose(1, 2).to(B_Gor.dtype)
    gram_Grr = A_Gri @ A_Gri.transpose(1, 2)
    cross_Go = (product_Gor * B_Gor).sum(-1)
    square_Go = ((B_Gor @ gram_Grr) * B_Gor).sum(-1)
    return (base_sq_Go + 2 * scaling * cross_Go + scaling**2 * square_Go).clamp_min(0).sqrt()


def adapted_weight(weight_oi: Tensor, A_ri: Tensor, B_or: Tensor, magnitude_o: Tensor | None, scaling: float) -> Tensor:
    """`m / ||W + s B A||_row (W + s B A)` as a dense matrix, the norm detached; without magnitude `W + s B A`.

    Batched over leading dimensions. For small matrices (routers) and for merging.
    """
    adapted_oi = weight_oi + scaling * (B_or @ A_ri)
    if magnitude_o is None:
        return adapted_oi
    return adapted_oi * (magnitude_o / safe_norm(adapted_oi.detach().norm(dim=-1))).unsqueeze(-1)


def safe_norm(norm: Tensor) -> Tensor:
    """The norm, kept above zero so that a row of zeros stays zero instead of becoming NaN."""
    return norm.clamp_min(torch.finfo(norm.dtype).tiny)


class DoraGroupedMatmul(torch.autograd.Function):
    """`[S, i] -> [S, o]` through the adapted weights of the G experts of one block.

    The rows are dequantised in forward and again in backward; nothing dense is kept. The scale `m / norm` is folded
    into the weight (n H numbers an expert) rather than applied to the outputs (o numbers a token), in 32 bit, because
    in 16 bit `W (1 + 0.001)` rounds back to W. Adding `s B A` to the loaded rows as well was measured: 3 to 8 % faster
    with a thousand tokens an expert, 25 % slower with 32, and in 16 bit it would lose small updates to rounding. So the
    low-rank path stays separate.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input_Si: Tensor,
        A_Gri: Tensor,
        B_Gor: Tensor,
        magnitude_Go: Tensor | None,
        base_sq_Go: Tensor | None,
        block: RowBlock,
        bounds: tuple[int, ...],
        scaling: float,
    ) -> Tensor:
        """`bounds [G + 1]` are the offsets of the experts in S; `magnitude_Go = None` is plain LoRA."""
        dtype = input_Si.dtype
        ctx.block, ctx.bounds, ctx.scaling = block, bounds, scaling
        rows_GnH = block.load(dtype if magnitude_Go is None else _at_least_fp32(dtype))
        scaled_B, scale_Go = scaling * B_Gor, None
        if magnitude_Go is not None and base_sq_Go is not None:
            norm_Go = adapted_norm(block.orient(rows_GnH).to(dtype), A_Gri, B_Gor, base_sq_Go, scaling)
            scale_Go = magnitude_Go / safe_norm(norm_Go)
            rows_GnH, scaled_B = block.scale(rows_GnH, scale_Go), scaled_B * scale_Go.unsqueeze(-1)
        reduced_Sr = grouped_matmul(input_Si, A_Gri.to(dtype).transpose(1, 2), bounds)
        output_So = grouped_matmul(input_Si, block.orient(rows_GnH).to(dtype), bounds)
        output_So.add_(grouped_matmul(reduced_Sr, scaled_B.to(dtype).transpose(1, 2), bounds))
        ctx.save_for_backward(input_Si, A_Gri, B_Gor, magnitude_Go, scale_Go, reduced_Sr, output_So)
        return output_So

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of input, A, B and magnitude; the base and the norm have none."""
        input_Si, A_Gri, B_Gor, magnitude_Go, scale_Go, reduced_Sr, output_So = ctx.saved_tensors
        grad_So, bounds, dtype = grads[0].contiguous(), ctx.bounds, input_Si.dtype
        factor_Go1 = ctx.scaling if scale_Go is None else ctx.scaling * scale_Go.unsqueeze(-1)
        grad_reduced_Sr = grouped_matmul(grad_So, (B_Gor * factor_Go1).to(dtype), bounds)
        grad_A = grad_B = grad_magnitude = grad_input = None
        if ctx.needs_input_grad[1]:
            grad_A = grouped_outer(grad_reduced_Sr, input_Si, bounds).to(A_Gri.dtype)
        if ctx.needs_input_grad[2]:
            grad_B = grouped_outer(grad_So, reduced_Sr, bounds).to(B_Gor.dtype) * factor_Go1
        if magnitude_Go is not None and ctx.needs_input_grad[3]:
            grad_magnitude = _sum_by_expert(grad_So * output_So, bounds).to(magnitude_Go.dtype)
            grad_magnitude = grad_magnitude / magnitude_Go.masked_fill(magnitude_Go == 0, 1)
        if ctx.needs_input_grad[0]:
            weight_Goi = ctx.block.load_scaled(dtype, scale_Go).transpose(1, 2)
            grad_input = grouped_matmul(grad_So, weight_Goi, bounds)
            grad_input.add_(grouped_matmul(grad_reduced_Sr, A_Gri.to(dtype), bounds))
        return grad_input, grad_A, grad_B, grad_magnitude, None, None, None, None


def dora_grouped_matmul(
    input_Si: Tensor,
    A_Gri: Tensor,
    B_Gor: Tensor,
    magnitude_Go: Tensor | None,
    base_sq_Go: Tensor | None,
    block: RowBlock,
    bounds: tuple[int, ...],
    scaling: float,
) -> Tensor:
    """`DoraGroupedMatmul` as a typed function."""
    arguments = (input_Si, A_Gri, B_Gor, magnitude_Go, base_sq_Go, block, bounds, scaling)
    return DoraGroupedMatmul.apply(*arguments)  # pyright: ignore[reportReturnType]


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _sum_by_expert(value_So: Tensor, bounds: tuple[int, ...]) -> Tensor:
    """Sum over each expert's own pairs: `[S, o] -> [G, o]`."""
    if len(bounds) == 2:
        return value_So.sum(0, keepdim=True)
    return grouped_outer(value_So.new_ones(len(value_So), _ONES_WIDTH), value_So, bounds)[:, 0]
