"""Tensors of safetensors files, read when they are asked for.  N rows (the first dimension) of a tensor."""

import hashlib
import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import str_to_torch_dtype

from lightning_moe.files import read_json, read_shapes

_BLOCK_BYTES = 16 * 2**20


class LazyTensor(ABC):
    """A tensor of known shape and type whose content is read when it is asked for, all of it or some rows."""

    file: Path
    key: str
    type_name: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """What `type_name`, the name of the type in safetensors, is in PyTorch."""
        return str_to_torch_dtype[self.type_name]

    @property
    def num_rows(self) -> int:
        """N; 1 of a scalar."""
        return self.shape[0] if self.shape else 1

    @abstractmethod
    def read_rows(self, first: int, last: int, *, into: Tensor) -> None:
        """Fills `into [last - first, ...]`, of the tensor's own type, with the rows `first` to `last - 1`.

        Raises:
            ValueError: the file is not what it was when it was opened.
        """


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredTensor(LazyTensor):
    """One tensor of a file.

    Args:
        file: where it is.
        key: its name there.
        type_name: its type as safetensors names it.
        shape: its shape.
        start: position of its first byte in the file.
        stamp: what tells the opened file from another one of this name.
    """

    file: Path
    key: str
    type_name: str
    shape: tuple[int, ...]
    start: int
    stamp: tuple[int, int]

    def read_rows(self, first: int, last: int, *, into: Tensor) -> None:
        """Plain reads of these rows alone, in the shape of `into`: no page of a mapped file stays in memory."""
        row_bytes = math.prod(self.shape[1:]) * into.element_size()
        target = memoryview(into.view(-1).view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
        with open(self.file, "rb", buffering=0) as file:
            if stamp_of(file.fileno()) != self.stamp:
                raise ValueError(f"'{self.file}' was changed while it was being read. Start again.")
            position, done = self.start + first * row_bytes, 0
            while done < len(target):
                count = os.preadv(file.fileno(), [target[done:]], position + done)
                if not count:
                    raise ValueError(f"'{self.file}' ends inside '{self.key}'. Write or download it again.")
                done += count


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """Rows of a tensor, as transformers takes them in place of a tensor: read, checked and cast at `[...]`.

    Args:
        tensor: what is read.
        dtype: type of the result.
        first: first row.
        last: one past the last row; all without one.
        masks: whether -inf is a value like others (a masked expert of a router).
    """

    tensor: LazyTensor
    dtype: torch.dtype
    first: int = 0
    last: int | None = None
    masks: bool = False

    def get_dtype(self) -> str:
        """Type as it is stored; transformers asks for it."""
        return self.tensor.type_name

    def __getitem__(self, every: Any) -> Tensor:
        """The rows, read in blocks: the memory above that of the result is one block.

        Raises:
            ValueError: a value is NaN, infinite or too large for `dtype`, or the file is not what it was when it was
                opened.
        """
        tensor, last = self.tensor, self.tensor.num_rows if self.last is None else self.last
        shape = (last - self.first, *tensor.shape[1:]) if tensor.shape else (1,)
        result = torch.empty(shape, dtype=self.dtype)
        step = max(1, _BLOCK_BYTES // max(1, math.prod(shape[1:]) * tensor.dtype.itemsize))
        for start in range(0, shape[0], step):
            rows = result[start : start + step]
            block = rows if tensor.dtype == self.dtype else torch.empty(rows.shape, dtype=tensor.dtype)
            tensor.read_rows(self.first + start, self.first + start + len(rows), into=block)
            self._check(block)
            if block is not rows:
                rows.copy_(block)
                self._check_cast(rows, block)
        return result if tensor.shape else result.reshape(())

    def _check(self, block: Tensor) -> None:
        if not block.is_floating_point() or torch.isfinite(block.sum(dtype=torch.float32)):
            return
        bad = block.isnan() | block.isposinf() if self.masks else ~block.isfinite()
        if bad.any():
            raise ValueError(
                f"'{self.tensor.file}' holds NaN or infinity in '{self.tensor.key}': the checkpoint is damaged. "
                "Write or download it again."
            )

    def _check_cast(self, rows: Tensor, block: Tensor) -> None:
        """Refuses what became infinite: a number of F32 may be larger than the largest of F16 or BF16."""
        if not rows.is_floating_point() or torch.isfinite(rows.sum(dtype=torch.float32)):
            return
        lost = rows.isinf() & block.isfinite()
        if lost.any():
            name = str(self.dtype).removeprefix("torch.")
            raise ValueError(
                f"'{self.tensor.file}' holds {block[lost][0].item():g} in '{self.tensor.key}', which does not fit "
                f"{name}, whose largest number is {torch.finfo(self.dtype).max:g}. Set `dtype` to float32, or write "
                "the checkpoint again."
            )


def stamp_of(file: str | Path | int) -> tuple[int, int]:
    """Size and time of change of a file: what tells it from another one that takes its name."""
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns


def open_files(files: Sequence[Path], *, index: Path | None = None) -> tuple[dict[str, LazyTensor], str]:
    """The tensors of safetensors files, of which only the headers are read, and a digest.

    The digest is SHA-256 over name, size and header of each file and a few bytes of each of 64 places in it.

    Args:
        files: the shards.
        index: their index, if there is one.

    Raises:
        ValueError: a file is missing or damaged, two files hold the same tensor, a type is unknown to transformers, or
            the index names a tensor for a file that lacks it.
    """
    tensors: dict[str, LazyTensor] = {}
    digest = hashlib.sha256()
    for file in files:
        read_shapes(file, what="file of weights")  # safetensors' own checks: nothing outside the file, no overlap
        header, own = _open_file(file)
        digest.update(f"{file.name}|{file.stat().st_size}|".encode() + header + _sample(file))
        for key in own.keys() & tensors.keys():
            raise ValueError(f"'{key}' is both in '{tensors[key].file}' and in '{file}'. Write or download them again.")
        tensors |= own
    if index is not None:
        _check_index(index, tensors=tensors)
    return tensors, digest.hexdigest()


def _open_file(file: Path) -> tuple[bytes, dict[str, StoredTensor]]:
    stamp = stamp_of(file)
    with open(file, "rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = opened.read(size)
    tensors: dict[str, StoredTensor] = {}
    for key, entry in json.loads(header).items():
        if key == "__metadata__":
            continue
        if entry["dtype"] not in str_to_torch_dtype:
            raise ValueError(
                f"'{key}' of '{file}' is stored as {entry['dtype']}, which transformers does not read. "
                f"It reads {', '.join(str_to_torch_dtype)}."
            )
        tensors[key] = StoredTensor(
            file=file,
            key=key,
            type_name=entry["dtype"],
            shape=tuple(entry["shape"]),
            start=8 + size + entry["data_offsets"][0],
            stamp=stamp,
        )
    return header, tensors


def _sample(file: Path) -> bytes:
    """512 bytes from each of 64 places: two trainings of one shape have the same header."""
    size = file.stat().st_size
    with open(file, "rb", buffering=0) as opened:
        return b"".join(os.pread(opened.fileno(), 512, size * place // 64) for place in range(64))


def _check_index(index: Path, *, tensors: Mapping[str, LazyTensor]) -> None:
    names: Mapping[str, str] = read_json(index, what="index of shards")["weight_map"]
    folder = index.parent
    for key, name in names.items():
        if key not in tensors or tensors[key].file != folder / name:
            raise ValueError(f"'{index}' says that '{folder / name}' holds '{key}', which it does not. Write it again.")


def examples(keys: Iterable[str], *, number: int = 3) -> str:
    """A few names of many: `a, b, c and 12 more`."""
    names = list(keys)
    more = f" and {len(names) - number} more" if len(names) > number else ""
    return ", ".join(names[:number]) + more
