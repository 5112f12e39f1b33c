"""DoRA on one projection of a few experts of equal width: plain functions on tensors, backward by hand.

One expert (Liu et al. 2024, DoRA; method.md section 6), with frozen weight W [o, i], A [r, i], B [o, r], scaling s, and
`scale = m / ||W + s B A||_row`, whose norm is a constant in backward:

    y = scale * (x W^T + s (x A^T) B^T)                              dm = sum_S(g * y) / m
    with u = scale * g:   dx = u W + s (u B) A,   dA = s (u B)^T x,   dB = s u^T (x A^T)

Outputs are scaled, not weights: S o numbers rather than i o. Where products are done in 16 bit their results are scaled
in 32, as PEFT does, so that a change of m by a thousandth is not lost.

S routed pairs sorted by expert, G experts, r rank, i and o inputs and outputs of the projection (H and n for gate and
up, n and H for down). `bounds [G + 1]` are the offsets of the experts' pairs in S; R = G*r rows of
all their A.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_moe.models.grouped import grouped_matmul, grouped_outer
from lightning_moe.models.products import product, product_pays

# Left operand of a sum over pairs: eight columns keep the rows 16 bytes wide in every type.
_SUM_WIDTH = 8
# Up to here copying the rows of a product costs less than a second product.
_FEW_ROWS = 64


class LowRank(NamedTuple):
    """The adapter of a projection; plain LoRA has no magnitude."""

    A_Gri: Tensor
    B_Gor: Tensor
    magnitude_Go: Tensor | None


class Gradients(NamedTuple):
    """Where the gradients of a `LowRank` are written; None is frozen."""

    A_Gri: Tensor | None
    B_Gor: Tensor | None
    magnitude_Go: Tensor | None


class Projected(NamedTuple):
    """What backward needs of a projection: its outputs, `x A^T`, and the scale (None: plain LoRA)."""

    output_So: Tensor
    reduced_Sr: Tensor
    scale_Go: Tensor | None


def squared_norms(weight_Gio: Tensor) -> Tensor:
    """`||W_o||^2` over the inputs: `[G, o]`."""
    return weight_Gio.pow(2).sum(1)


def adapted_norm(product_Gro: Tensor, A_Gri: Tensor, B_Gor: Tensor, base_sq_Go: Tensor, scaling: float) -> Tensor:
    """`||W + s B A||` of every output from `A W^T`, without a dense `B A`: `[G, o]`.

    `||W_o + s (BA)_o||^2 = ||W_o||^2 + (2 s A W_o^T + s^2 A A^T B_o^T) . B_o`, method.md section 6.

    Examples:
        One output whose row is [3, 0]; the adapter adds 2 * 2 * [0, 1] to it: the norm of [3, 4].

        >>> A_Gri, B_Gor = torch.tensor([[[0.0, 1.0]]]), torch.tensor([[[2.0]]])
        >>> adapted_norm(torch.tensor([[[0.0]]]), A_Gri, B_Gor, torch.tensor([[9.0]]), 2.0).tolist()
        [[5.0]]
    """
    gram_Grr, B_Gro = A_Gri @ A_Gri.transpose(1, 2), B_Gor.transpose(1, 2)
    terms_Gro = torch.baddbmm(product_Gro.to(B_Gor.dtype), gram_Grr, B_Gro, beta=2 * scaling, alpha=scaling**2)
    return (base_sq_Go + (terms_Gro * B_Gro).sum(1)).clamp_min(0).sqrt()


def adapted_weight(weight_oi: Tensor, A_ri: Tensor, B_or: Tensor, magnitude_o: Tensor | None, scaling: float) -> Tensor:
    """`m / ||W + s B A||_row (W + s B A)` as a dense matrix `[o, i]`, the norm detached; without magnitude `W + s B A`.

    Batched over leading dimensions. For small matrices (routers) and for merging.

    Examples:
        >>> weight_oi, A_ri, B_or = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0]])
        >>> adapted_weight(weight_oi, A_ri, B_or, None, 2.0).tolist()
        [[3.0, 4.0]]
        >>> adapted_weight(weight_oi, A_ri, B_or, torch.tensor([10.0]), 2.0).tolist()  # a row of length 10
        [[6.0, 8.0]]
    """
    adapted_oi = weight_oi + scaling * (B_or @ A_ri)
    if magnitude_o is None:
        return adapted_oi
    return adapted_oi * (magnitude_o / safe_norm(adapted_oi.detach().norm(dim=-1))).unsqueeze(-1)


def safe_norm(norm: Tensor) -> Tensor:
    """The norm (any shape), kept above zero so that a row of zeros stays zero instead of becoming NaN."""
    return norm.clamp_min(torch.finfo(norm.dtype).tiny)


def frozen_products(
    input_Si: Tensor, weight_Gio: Tensor, A_Gri: Tensor | None, bounds: tuple[int, ...]
) -> tuple[Tensor, Tensor | None]:
    """`x W^T [S, o]` and, where A is given, `A W^T [G, r, o]` for the norm.

    A few rows of one expert and its A are one product where oneDNN does both, since its cost is reading W: 15 % less
    than two with 32 rows each. A row's sums are the same either way: outputs do not depend on whether norms were known.
    """
    if A_Gri is None:
        return grouped_matmul(input_Si, weight_Gio, bounds), None
    A_Gri = A_Gri.to(input_Si.dtype)
    if len(bounds) == 2 and len(input_Si) <= _FEW_ROWS and _onednn_does(input_Si, A_Gri[0], weight_Gio[0]):
        joined = product(torch.cat([input_Si, A_Gri[0]]), weight_Gio[0])
        # The outputs are kept for backward: copied, so that the rest is not.
        return joined[: len(input_Si)].clone(), joined[len(input_Si) :].unsqueeze(0)
    each_A = tuple(range(0, A_Gri.shape[0] * A_Gri.shape[1] + 1, A_Gri.shape[1]))
    product_Ro = grouped_matmul(A_Gri.flatten(0, 1), weight_Gio, each_A)
    return grouped_matmul(input_Si, weight_Gio, bounds), product_Ro.view(*A_Gri.shape[:2], -1)


def project(
    input_Si: Tensor,
    frozen_So: Tensor,
    adapter: LowRank,
    scale_Go: Tensor | None,
    *,
    scaling: float,
    bounds: tuple[int, ...],
    expert_S: Tensor | None,
) -> Projected:
    """`y` of the module's description; scaled outputs are at least 32 bit, plain LoRA's have the input's type.

    Args:
        input_Si: x.
        frozen_So: `x W^T`; it is overwritten.
        adapter: A and B.
        scale_Go: `m / norm`.
        scaling: s.
        bounds: of the experts' pairs.
        expert_S: expert of each pair; None where G is 1.
    """
    dtype = input_Si.dtype
    reduced_Sr = grouped_matmul(input_Si, adapter.A_Gri.to(dtype).transpose(1, 2), bounds)
    low_rank_So = grouped_matmul(reduced_Sr, adapter.B_Gor.to(dtype).transpose(1, 2), bounds)
    output_So = frozen_So.add_(low_rank_So, alpha=scaling)
    if scale_Go is not None:
        output_So = output_So.to(scale_Go.dtype).mul_(_per_pair(scale_Go, expert_S))
    return Projected(output_So, reduced_Sr, scale_Go)


def pull_back(
    grad_So: Tensor,
    weight_Gio: Tensor | None,
    adapter: LowRank,
    *,
    scaling: float,
    bounds: tuple[int, ...],
) -> tuple[Tensor, Tensor | None]:
    """`s u B [S, r]` and `u W + s u B A [S, i]` of `u`, the scaled gradient; the latter only where W is given."""
    grad_reduced_Sr = grouped_matmul(grad_So, adapter.B_Gor.to(grad_So.dtype), bounds).mul_(scaling)
    if weight_Gio is None:
        return grad_reduced_Sr, None
    grad_Si = grouped_matmul(grad_So, weight_Gio.transpose(1, 2), bounds)
    return grad_reduced_Sr, grad_Si.add_(grouped_matmul(grad_reduced_Sr, adapter.A_Gri.to(grad_So.dtype), bounds))


def scaled_gradient(grad_So: Tensor, scale_Go: Tensor | None, expert_S: Tensor | None, *, dtype: torch.dtype) -> Tensor:
    """`u = scale * g`, `[S, o]`, in the type of the products; `g` is not changed."""
    if scale_Go is None:
        return grad_So.to(dtype)
    return (grad_So * _per_pair(scale_Go, expert_S)).to(dtype)


def write_low_rank_gradients(
    into: Gradients,
    input_Si: Tensor,
    reduced_Sr: Tensor,
    grad_So: Tensor,
    grad_reduced_Sr: Tensor,
    bounds: tuple[int, ...],
) -> None:
    """`dA = (s u B)^T x` and `dB = u^T (s x A^T)`, where `reduced_Sr` is `s x A^T` and `grad_So` is u."""
    if into.A_Gri is not None:
        into.A_Gri.copy_(_outer(grad_reduced_Sr, input_Si, bounds))
    if into.B_Gor is not None:
        into.B_Gor.copy_(_outer(reduced_Sr, grad_So, bounds).transpose(1, 2))


def write_magnitude_gradient(
    into: Gradients,
    adapter: LowRank,
    grad_So: Tensor,
    output_So: Tensor,
    weight_S: Tensor | None,
    bounds: tuple[int, ...],
) -> None:
    """`dm = sum_S(w g y) / m`; 0 where m is 0."""
    if into.magnitude_Go is not None and adapter.magnitude_Go is not None:
        magnitude_Go = adapter.magnitude_Go
        sum_Go = _sum_by_expert(grad_So * output_So, weight_S, bounds, output_So.dtype)
        into.magnitude_Go.copy_(sum_Go / magnitude_Go.masked_fill(magnitude_Go == 0, 1))


def _per_pair(value_Go: Tensor, expert_S: Tensor | None) -> Tensor:
    """Each pair's row of a value per expert: `[S, o]`, or `[1, o]` of the only one."""
    return value_Go if expert_S is None else value_Go.index_select(0, expert_S)


def _onednn_does(input_Si: Tensor, A_ri: Tensor, weight_io: Tensor) -> bool:
    return product_pays(input_Si, weight_io) and product_pays(A_ri, weight_io)


def _outer(thin_Sr: Tensor, wide_Sn: Tensor, bounds: tuple[int, ...]) -> Tensor:
    """`[G, r, n]`; the thin side is the rows, as few rows of long sums are what a matrix product does best."""
    if len(bounds) == 2:
        return product(thin_Sr.T, wide_Sn).unsqueeze(0)
    return grouped_outer(thin_Sr, wide_Sn, bounds)


def _sum_by_expert(value_So: Tensor, weight_S: Tensor | None, bounds: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """(Weighted) sum over each expert's own pairs: `[S, o] -> [G, o]`; several experts as a product of that type."""
    if len(bounds) == 2:
        return value_So.sum(0, keepdim=True) if weight_S is None else weight_S[None] @ value_So
    left_S = torch.ones_like(value_So[:, 0], dtype=dtype) if weight_S is None else weight_S.to(dtype)
    return grouped_outer(left_S.unsqueeze(1).repeat(1, _SUM_WIDTH), value_So.to(dtype), bounds)[:, 0]
