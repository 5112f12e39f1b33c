"""Tensors of safetensors files before there are any: names, types, shapes, what headers and the index of shards take.

n rows, m columns of a Linear layer.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from lightning_moe.models.channel_experts import PROJECTIONS, DenseRows
from lightning_moe.quantization.nf4 import PackedRows
from lightning_moe.quantization.rounding import BLOCK_SIZE

_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
_NESTED_BLOCK = 256  # absmax values of bitsandbytes that share one nested absmax
_NF4_VALUES, _NESTED_VALUES = 16, 256
_LONGEST_OFFSET = 0.00012345678901234567  # as many digits as a number has here: all else is fixed by the shape


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor of a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """How many numbers it has."""
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of its numbers."""
        return self.numel * self.dtype.itemsize


def as_stored(name: str, tensor: Tensor, *, dtype: torch.dtype | None = None) -> StoredTensor:
    """A tensor of any shape (of the meta device, say) as it is stored, in its own type if `dtype` is None."""
    return StoredTensor(name=name, dtype=tensor.dtype if dtype is None else dtype, shape=tuple(tensor.shape))


def expert_tensors(
    name: str, *, num_channels: int, hidden_size: int, dtype: torch.dtype, packed: bool
) -> list[StoredTensor]:
    """The three projections of the experts module `name`: dense rows of `dtype`, or NF4 rows."""
    with torch.device("meta"):
        rows: nn.Module = PackedRows(1, hidden_size) if packed else DenseRows(torch.empty(1, hidden_size, dtype=dtype))
    return [
        StoredTensor(
            name=f"{name}.{projection}.{part}", dtype=tensor.dtype, shape=(num_channels, *tuple(tensor.shape)[1:])
        )
        for projection in PROJECTIONS
        for part, tensor in rows.state_dict().items()
    ]


def packed_linear_tensors(name: str, *, shape: Sequence[int], dtype: torch.dtype) -> list[StoredTensor]:
    """What bitsandbytes stores of the weight `name` `[n, m]` of a Linear layer in double-quantised NF4.

    Codes, 8-bit absmax of blocks of 64, their fp32 absmax in blocks of 256, two tables, and a description as text, in
    which data decide how many digits one number has: it is counted with the most, a few bytes too many.
    """
    numel, num_blocks = prod(shape), -(-prod(shape) // BLOCK_SIZE)
    described = {
        "quant_type": "nf4",
        "blocksize": BLOCK_SIZE,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(shape),
        "nested_blocksize": _NESTED_BLOCK,
        "nested_dtype": "float32",
        "nested_offset": _LONGEST_OFFSET,
    }
    sizes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "": (torch.uint8, (numel // 2, 1)),
        ".absmax": (torch.uint8, (num_blocks,)),
        ".nested_absmax": (torch.float32, (-(-num_blocks // _NESTED_BLOCK),)),
        ".nested_quant_map": (torch.float32, (_NESTED_VALUES,)),
        ".quant_map": (torch.float32, (_NF4_VALUES,)),
        ".quant_state.bitsandbytes__nf4": (torch.uint8, (len(json.dumps(described)),)),
    }
    return [StoredTensor(name=f"{name}{part}", dtype=kind, shape=size) for part, (kind, size) in sizes.items()]


def file_bytes(tensors: Iterable[StoredTensor]) -> int:
    """Bytes of one safetensors file: eight for the length of the header, the header in whole eights, the numbers.

    Examples:
        >>> tensor = StoredTensor(name="w", dtype=torch.bfloat16, shape=(3, 64))
        >>> tensor.num_bytes, file_bytes([tensor]) - tensor.num_bytes  # 8 for the length, 91 of header in eights
        (384, 104)
    """
    begin, content = 0, {"__metadata__": {"format": "pt"}}
    for tensor in sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name)):
        end = begin + tensor.num_bytes
        entry = {"dtype": _NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": (begin, end)}
        content[tensor.name] = entry  # pyright: ignore[reportArgumentType]
        begin = end
    header = len(json.dumps(content, separators=(",", ":")))
    return 8 + -(-header // 8) * 8 + begin


def sharded_bytes(tensors: Iterable[StoredTensor], *, decoder_names: Sequence[str]) -> int:
    """Bytes of the files that `prune` writes, and of their index.

    L decoder layers make L + 1 files: one for each of `decoder_names`, and the last for everything outside them.
    """
    shards: list[list[StoredTensor]] = [[] for _ in range(len(decoder_names) + 1)]
    shard_of = {name: index for index, name in enumerate(decoder_names)}
    depth = decoder_names[0].count(".") + 1
    total_size, files = 0, {}
    for tensor in tensors:
        index = shard_of.get(".".join(tensor.name.split(".")[:depth]), len(decoder_names))
        shards[index].append(tensor)
        total_size += tensor.num_bytes
        files[tensor.name] = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
    described = {"metadata": {"total_size": total_size}, "weight_map": files}  # the order does not change its length
    return sum(map(file_bytes, shards)) + len(json.dumps(described, indent=2)) + 1
