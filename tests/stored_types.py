"""Safetensors headers that name a type of choice."""

import json
import math
from pathlib import Path


def restate_type(path: Path, name: str, *, dtype: str, bits: int) -> None:
    """Rewrites the header of a safetensors file: a tensor's bytes are now numbers of type `dtype`, `bits` wide."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    start, end = header[name]["data_offsets"]
    header[name] |= {"dtype": dtype, "shape": [(end - start) * 8 // bits]}
    text = json.dumps(header).encode()
    text = text.ljust(8 * math.ceil(len(text) / 8))
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
