"""NF4 expert rows with row-wise double quantisation.  C channels, H hidden, B = H / 64 blocks of a row.

Every row is whole blocks of 64, and its absmax values are 8-bit codes under one fp32 scale per row (4 + 8/64 + 32/H
bits a weight: 4.14 at H = 2048), so selecting rows of a packed matrix is exact. bitsandbytes' own nested statistics
run over 256 absmax values at a time, across rows, and do not survive row selection.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import accumulate

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type
from torch import Tensor, nn
from typing_extensions import override

from lightning_moe.models.channel_experts import PROJECTIONS, ChannelExperts, DenseRows, RowLoader, RowStorage
from lightning_moe.quantization.rounding import BLOCK_SIZE, quantize_rows

_MAX_CODE = 255


class PackedRows(RowStorage):
    """Rows in NF4: `codes [C, H/2]` uint8, `absmax [C, B]` uint8, `scale [C]` fp32.

    All three are frozen parameters: DDP would send buffers round at every forward, and FSDP2 shards parameters only.

    Args:
        num_rows: C.
        hidden_size: H, a multiple of 64.

    Raises:
        ValueError: the hidden size is not a multiple of the block size.
    """

    packed = True

    def __init__(self, num_rows: int, hidden_size: int) -> None:
        super().__init__()
        check_hidden_size(hidden_size)
        self.hidden_size = hidden_size
        self.codes = _frozen(torch.empty(num_rows, hidden_size // 2, dtype=torch.uint8))
        self.absmax = _frozen(torch.empty(num_rows, hidden_size // BLOCK_SIZE, dtype=torch.uint8))
        self.scale = _frozen(torch.empty(num_rows, dtype=torch.float32))

    @classmethod
    def pack(cls, weight_CH: Tensor) -> "PackedRows":
        """Quantises rows `[C, H]`; each row depends on itself alone. Rows on the meta device give empty ones there."""
        num_rows, hidden_size = weight_CH.shape
        packed = cls(num_rows, hidden_size).to(weight_CH.device)
        if num_rows == 0 or weight_CH.is_meta:
            return packed
        codes, absmax_CB = quantize_rows(weight_CH.detach())
        scale_C = absmax_CB.amax(1)
        ratio_CB = absmax_CB / scale_C.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)
        packed.codes = _frozen(codes)
        packed.absmax = _frozen((ratio_CB * _MAX_CODE).round().to(torch.uint8))
        packed.scale = _frozen(scale_C)
        return packed

    @property
    def shape(self) -> tuple[int, int]:
        """(channels, hidden)."""
        return self.codes.shape[0], self.hidden_size

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows `start:stop` dequantised to `[n, H]`."""
        if start == stop:
            return torch.empty(0, self.hidden_size, dtype=dtype, device=self.codes.device)
        absmax_nB = self.absmax[start:stop] * (self.scale[start:stop].float() / _MAX_CODE).unsqueeze(1)
        state = QuantState(
            absmax=absmax_nB.reshape(-1),
            shape=torch.Size((stop - start, self.hidden_size)),
            dtype=torch.float32 if dtype == torch.float64 else dtype,
            blocksize=BLOCK_SIZE,
            code=_nf4_code(self.codes.device),
            quant_type="nf4",
        )
        return dequantize_4bit(self.codes[start:stop].reshape(-1, 1), state).to(dtype)

    def blocks(self, sizes: Sequence[int]) -> list[RowLoader]:
        """One dequantising loader for each of the consecutive blocks of `sizes` rows."""
        return [partial(self._block_rows, offset) for offset in accumulate(sizes[:-1], initial=0)]

    def _block_rows(self, offset: int, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        return self.rows(offset + start, offset + stop, dtype)

    def select(self, index_C: Tensor) -> "PackedRows":
        """A new module with the rows of `index_C`, in that order, bit for bit.

        Examples:
            >>> packed = PackedRows.pack(torch.tensor([[1.0], [2.0], [4.0]]).expand(3, 64))
            >>> packed.select(torch.tensor([2, 0])).rows(0, 2, torch.float32)[:, 0].tolist()
            [4.0, 1.0]
        """
        selected = PackedRows(len(index_C), self.hidden_size)
        for name, stored in self.named_parameters():
            selected.register_parameter(name, _frozen(stored.index_select(0, index_C)))
        return selected

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedRows":
        """Moves like any module, but `.to(dtype)` leaves the scales in fp32: rounding them would change the weights."""
        scale_C = self.scale.detach()
        super()._apply(fn, recurse)
        if self.scale.dtype != torch.float32:
            self.scale = _frozen(scale_C.to(self.scale.device))
        return self


def check_hidden_size(hidden_size: int) -> None:
    """Raises ValueError where rows of this hidden size cannot be stored in 4 bit."""
    if hidden_size % BLOCK_SIZE:
        raise ValueError(
            f"4-bit storage needs a hidden size that is a multiple of {BLOCK_SIZE}, got {hidden_size}. "
            "Keep this model in 16 bit (`quantize: none`)."
        )


def pack_experts(experts: ChannelExperts) -> None:
    """Puts the three projections of a layer in NF4, in place; a packed layer is left as it is."""
    for name in PROJECTIONS:
        rows = experts.projection(name)
        if isinstance(rows, DenseRows):
            setattr(experts, name, PackedRows.pack(rows.weight))


def unpack_experts(experts: ChannelExperts, *, dtype: torch.dtype) -> None:
    """Dequantises the three projections of a layer, in place."""
    for name in PROJECTIONS:
        rows = experts.projection(name)
        if isinstance(rows, PackedRows):
            setattr(experts, name, DenseRows(rows.rows(0, rows.shape[0], dtype)))


def _frozen(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)


@cache
def _nf4_code(device: torch.device) -> Tensor:
    return get_4bit_type("nf4", device=device)
