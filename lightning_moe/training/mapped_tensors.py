"""Tensors as memory maps of safetensors files: a process reads pages of the file, which it shares with all others."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers.modeling_utils import str_to_torch_dtype

from lightning_moe.models.stored_tensors import LazyTensor, StoredTensor, stamp_of

# Bytes: grouped products on the CPU use rows where they lie only if they lie so.
ALIGNMENT = 16

_TYPE_NAMES = {dtype: name for name, dtype in str_to_torch_dtype.items()}


def map_tensor(stored: LazyTensor) -> Tensor:
    """A private map of one tensor alone, in its shape: a page is copied where it is written to, all go with it.

    Raises:
        ValueError: the file is not what it was when it was opened.
    """
    assert isinstance(stored, StoredTensor)
    if stamp_of(stored.file) != stored.stamp:
        raise ValueError(f"'{stored.file}' was changed while it was being read. Start again.")
    num_bytes = math.prod(stored.shape) * stored.dtype.itemsize
    if not num_bytes:
        return torch.empty(stored.shape, dtype=stored.dtype)
    content = np.memmap(stored.file, dtype=np.uint8, mode="c", offset=stored.start, shape=(num_bytes,))
    return torch.from_numpy(content).view(stored.dtype).view(stored.shape)


def write_mappable(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file in which every tensor whose size allows it begins at a multiple of `ALIGNMENT`.

    Tensors of odd sizes come last; the header is filled up with blanks, as the format permits.
    """
    names = sorted(tensors, key=lambda name: (tensors[name].nbytes % ALIGNMENT > 0, -tensors[name].itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        type_name, shape = _TYPE_NAMES[tensors[name].dtype], list(tensors[name].shape)
        header[name] = {"dtype": type_name, "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-(8 + len(encoded)) % ALIGNMENT)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in names:
            file.write(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
