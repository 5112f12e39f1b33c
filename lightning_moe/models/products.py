"""One matrix product with the fastest fp32 kernel of the machine, for code that needs no autograd.

PyTorch sends fp32 products on a CPU to MKL, which uses half the vector width of processors that are not Intel's: 110
GFLOP/s on one EPYC core where oneDNN, shipped in the same wheel, reaches 250. bf16 goes to oneDNN already, and a GPU
has its own library. This is the only file that calls PyTorch's oneDNN operator (the one TorchInductor emits).
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
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")


def product(left_mk: Tensor, right_kn: Tensor) -> Tensor:
    """`left @ right` for `[m, k]` and `[k, n]` (any strides); differentiable where autograd asks for it.

    Equal to `torch.mm` up to the order of the sums, on every device and for every type.
    """
    if not _onednn_pays(left_mk, right_kn):
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
    return torch.ops.mkldnn._linear_pointwise(left_mk, right_kn.T, None, "none", [], "")


def _onednn_pays(left_mk: Tensor, right_kn: Tensor) -> bool:
    return (
        _HAS_ONEDNN
        and left_mk.dtype == right_kn.dtype == torch.float32
        and left_mk.device.type == right_kn.device.type == "cpu"
        and len(left_mk) >= _MIN_ROWS
        and len(left_mk) * right_kn.numel() >= _MIN_WORK
        and not (torch.is_grad_enabled() and (left_mk.requires_grad or right_kn.requires_grad))
        and not torch.is_autocast_enabled("cpu")
        and bool(torch.backends.mkldnn.enabled)
    )
