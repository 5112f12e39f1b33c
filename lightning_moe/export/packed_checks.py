"""Checks what a file says of Linear layers in 4 bit: bitsandbytes follows it into memory without looking.

n rows, m columns of a Linear layer.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import torch

from lightning_moe.models.stored_tensors import LazyTensor, Part
from lightning_moe.quantization.stored import packed_linear_tensors

DESCRIPTION = "quant_state.bitsandbytes__nf4"
_LONGEST_DESCRIPTION = 1000  # bytes; they take some 200
_TYPES = ("float32", "bfloat16", "float16")


def check_packed_linear(name: str, *, stored: Mapping[str, LazyTensor], shape: tuple[int, int]) -> None:
    """Refuses block statistics and a description that are not those of a weight of this shape.

    Args:
        name: full name of the weight.
        stored: what the files hold.
        shape: (n, m).

    Raises:
        ValueError: see above; the message names the file and the tensor.
    """
    for expected in packed_linear_tensors(name, shape=shape, dtype=torch.bfloat16):
        if expected.name not in stored:
            raise ValueError(f"'{stored[name].file}' and its shards lack '{expected.name}', which '{name}' needs.")
        found, wanted = stored[expected.name], (expected.dtype, expected.shape)
        is_text = expected.name.endswith(DESCRIPTION)
        if is_text:
            wanted = (expected.dtype, (min(math.prod(found.shape), _LONGEST_DESCRIPTION),))
        if (found.dtype, found.shape) != wanted:
            raise ValueError(
                f"'{found.key}' in '{found.file}' is {found.type_name} of shape {found.shape}, but a packed weight of "
                f"shape {shape} needs {wanted[0]} of shape {wanted[1]}. Write or download it again."
            )
        with torch.device("cpu"):  # transformers calls this inside a meta context
            content = Part(tensor=found, dtype=found.dtype)[...]  # refuses NaN and infinity
        if is_text:
            _check_description(bytes(content.tolist()), found=found, shape=shape)


def _check_description(text: bytes, *, found: LazyTensor, shape: tuple[int, int]) -> None:
    try:
        described: Any = json.loads(text)
    except (ValueError, RecursionError):
        described = None
    described = described if isinstance(described, dict) else {}
    wanted = {"quant_type": "nf4", "blocksize": 64, "shape": list(shape), "nested_blocksize": 256}
    wanted["nested_dtype"] = "float32"
    odd = [
        key for key, value in wanted.items() if described.get(key) != value or type(described[key]) is not type(value)
    ]
    offset = described.get("nested_offset")
    if not isinstance(offset, float) or not math.isfinite(offset):
        odd.append("nested_offset")
    if described.get("dtype") not in _TYPES:
        odd.append("dtype")
    if odd or described.keys() != {*wanted, "nested_offset", "dtype"}:
        raise ValueError(
            f"'{found.key}' in '{found.file}' does not describe a weight of shape {shape} in NF4: "
            f"{odd or sorted(described)} do not fit. Write or download it again."
        )
