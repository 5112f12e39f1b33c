"""One matrix product with the fastest CPU kernel of the machine, for code that needs no autograd.

PyTorch sends fp32 products on a CPU to MKL, which uses half the vector width of processors that are not Intel's: 110
GFLOP/s on one EPYC core where oneDNN, shipped in the same wheel, reaches 250. bf16 goes to oneDNN already, and a GPU
has its own library. This is the only file that calls PyTorch's oneDNN operator (the one TorchInductor emits).

A few bf16 vectors times a matrix that is stored by rows are sums of rows with weights. The kernel of embedding bags is
made for that and reads 28 GB/s with one vector, where oneDNN rearranges the matrix first and reads 9.
"""

import platform

import torch
from torch import Tensor
from torch.nn import functional

# oneDNN compiles a kernel for each shape (0.3 ms) and keeps 1,024 of them, so rows go in blocks of few sizes.
_BLOCK_ROWS, _ROW_STEP = 256, 16
_MIN_ROWS = 8
# Multiplications below which a call costs more than it saves.
_MIN_WORK = 2**21
# Vectors up to which a sum of rows is faster, and the smallest matrix for which it is.
_MAX_VECTORS, _MIN_MATRIX = 4, 2**17
_IS_X86 = platform.machine() in ("x86_64", "AMD64")
_HAS_ONEDNN = _IS_X86 and torch.backends.mkldnn.is_available()


def product(left_mk: Tensor, right_kn: Tensor) -> Tensor:
    """`left @ right` for `[m, k]` and `[k, n]` (any strides); differentiable in reverse mode.

    Equal to `torch.mm` up to the order of the sums, on every device and for every type.

    Examples:
        >>> product(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]])).tolist()
        [[11.0]]
    """
    if _is_sum_of_rows(left_mk, right_kn):
        return _sum_of_rows(left_mk, right_kn)
    if not product_pays(left_mk, right_kn):
        return left_mk @ right_kn
    num_rows = len(left_mk)
    if num_rows <= _BLOCK_ROWS:
        padding = -num_rows % _ROW_STEP
        return _onednn(functional.pad(left_mk, (0, 0, 0, padding)) if padding else left_mk, right_kn)[:num_rows]
    output_mn = left_mk.new_empty(num_rows, right_kn.shape[1])
    for start in range(0, num_rows, _BLOCK_ROWS):
        # The last block is rounded up over rows that are done already: no padding, the same result.
        size = min(_BLOCK_ROWS, num_rows - start + (start - num_rows) % _ROW_STEP)
        stop = min(start + _BLOCK_ROWS, num_rows)
        output_mn[stop - size : stop] = _onednn(left_mk[stop - size : stop], right_kn)
    return output_mn


def _onednn(left_mk: Tensor, right_kn: Tensor) -> Tensor:
    """A right side with gaps between its rows or columns would get oneDNN's reference kernel, 400 times slower."""
    right_nk = right_kn.T
    if not (right_nk.is_contiguous() or right_kn.is_contiguous()):
        right_nk = right_nk.contiguous()
    return torch.ops.mkldnn._linear_pointwise(left_mk, right_nk, None, "none", [], "")


def product_pays(left_mk: Tensor, right_kn: Tensor, *, num_groups: int = 1) -> bool:
    """Whether oneDNN does better than `@` here: a CPU in fp32 without autograd, and enough work for a call.

    With `num_groups` the right side is `[num_groups, k, n]` and each matrix gets its share of the rows of the left.
    """
    num_rows = len(left_mk) // num_groups
    return (
        _HAS_ONEDNN
        and left_mk.dtype == right_kn.dtype == torch.float32
        and num_rows >= _MIN_ROWS
        and num_rows * right_kn.numel() >= _MIN_WORK * num_groups
        and _is_plain_cpu(left_mk, right_kn)
        and bool(torch.backends.mkldnn.enabled)
    )


def _sum_of_rows(left_mk: Tensor, right_kn: Tensor) -> Tensor:
    """`sum_k left[m, k] right[k]`, added up in fp32."""
    index_mk = torch.arange(len(right_kn)).expand(left_mk.shape)
    return functional.embedding_bag(index_mk, right_kn, mode="sum", per_sample_weights=left_mk)


def _is_sum_of_rows(left_mk: Tensor, right_kn: Tensor) -> bool:
    return (
        _IS_X86
        and 0 < len(left_mk) <= _MAX_VECTORS
        and left_mk.dtype == right_kn.dtype == torch.bfloat16
        and right_kn.numel() >= _MIN_MATRIX
        and right_kn.is_contiguous()
        and _is_plain_cpu(left_mk, right_kn)
    )


def _is_plain_cpu(left_mk: Tensor, right_kn: Tensor) -> bool:
    """Neither another device, nor autograd, nor autocast."""
    return (
        left_mk.device.type == right_kn.device.type == "cpu"
        and not (torch.is_grad_enabled() and (left_mk.requires_grad or right_kn.requires_grad))
        and not torch.is_autocast_enabled("cpu")
    )
