"""NF4 codes of rows.  C rows, H hidden, B = H / 64 blocks of a row, R rows at a time."""

from functools import cache

import torch
from bitsandbytes.functional import get_4bit_type, quantize_4bit
from torch import Tensor

BLOCK_SIZE = 64
# Values whose temporaries (fp32, a mask and codes) fit a core's caches.
_VALUES_AT_A_TIME = 2**18
_SMALLEST = 1e-38  # of a block's largest value: what bitsandbytes divides a block of zeros by


def check_finite(weight: Tensor, *, what: str, advice: str) -> None:
    """Refuses NaN and infinity, in any shape: 4-bit codes would spread them over their row, or hide them.

    Raises:
        ValueError: `what` holds one; `advice` says what to do.
    """
    # One NaN makes both ends NaN; forty times as fast as asking each value.
    if weight.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(weight))).all()):
        raise ValueError(f"{what} holds NaN or infinity, for which there is no 4-bit code. {advice}")


def quantize_rows(weight_CH: Tensor) -> tuple[Tensor, Tensor]:
    """Finite rows as `quantize_4bit(weight_CH.float(), blocksize=64, quant_type="nf4")` of bitsandbytes, bit for bit.

    On the CPU bitsandbytes searches each value in the table and keeps temporaries of the whole matrix. Here a code is
    counted, `sum_i [w / absmax > midpoint_i]` over the 15 midpoints between neighbouring NF4 values, a few rows at a
    time: about four times as fast, without a copy of the matrix in fp32. Other devices have a kernel of their own.

    Args:
        weight_CH: rows of any floating type, H a multiple of 64.

    Returns:
        Codes, uint8 `[C, H/2]`, and the largest absolute value of each block, fp32 `[C, B]`.

    Raises:
        ValueError: a row holds NaN or infinity.

    Examples:
        >>> codes, absmax_CB = quantize_rows(torch.tensor([[0.5, -0.5] * 32]))
        >>> hex(codes[0, 0].item()), absmax_CB.tolist()  # 1 is the highest of 16 levels, -1 the lowest
        ('0xf0', [[0.5]])
    """
    codes, absmax_CB = _quantize(weight_CH)
    largest = absmax_CB if weight_CH.device.type == "cpu" else weight_CH  # a GPU's maximum passes over NaN
    what = f"A weight of type {weight_CH.dtype} that goes to 4 bit"
    check_finite(largest, what=what, advice="Load the model in `bfloat16` or `float32`, or look for what damaged it.")
    return codes, absmax_CB


def _quantize(weight_CH: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and maxima; the maximum of a block with NaN is NaN."""
    num_rows, hidden_size = weight_CH.shape
    codes = torch.empty(num_rows, hidden_size // 2, dtype=torch.uint8, device=weight_CH.device)
    absmax_CB = torch.empty(num_rows, hidden_size // BLOCK_SIZE, device=weight_CH.device)
    if weight_CH.device.type != "cpu":
        packed, state = quantize_4bit(weight_CH.float().contiguous(), blocksize=BLOCK_SIZE, quant_type="nf4")
        return packed.view_as(codes), state.absmax.view_as(absmax_CB)
    step = max(1, _VALUES_AT_A_TIME // hidden_size)
    for first in range(0, num_rows, step):
        rows = slice(first, first + step)
        _quantize_block(weight_CH[rows].float(), codes=codes[rows], absmax_RB=absmax_CB[rows])
    return codes, absmax_CB


def _quantize_block(weight_RH: Tensor, *, codes: Tensor, absmax_RB: Tensor) -> None:
    """Fills the codes and maxima of a few fp32 rows."""
    block_RBn = weight_RH.reshape(len(weight_RH), -1, BLOCK_SIZE)
    torch.amax(block_RBn.abs(), dim=2, out=absmax_RB)
    inverse_RB1 = (1.0 / absmax_RB.clamp(min=_SMALLEST)).unsqueeze(2)
    scaled_RH = (block_RBn * inverse_RB1).clamp_(-1, 1).view_as(weight_RH)
    code_RH = torch.zeros(scaled_RH.shape, dtype=torch.uint8)
    above_RH = torch.empty(scaled_RH.shape, dtype=torch.bool)
    for midpoint in _midpoints():
        torch.gt(scaled_RH, midpoint, out=above_RH)
        code_RH += above_RH.view(torch.uint8)
    torch.bitwise_or(code_RH[:, 0::2] << 4, code_RH[:, 1::2], out=codes)


@cache
def _midpoints() -> tuple[float, ...]:
    """The 15 midpoints of neighbouring NF4 values, in fp32."""
    code = get_4bit_type("nf4", device=torch.device("cpu"))
    return tuple(((code[:-1] + code[1:]) / 2).tolist())
