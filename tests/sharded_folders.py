"""The files that `prune` writes, made from a folder of one file: an independent reference for their layout."""

import json
import struct
from collections import defaultdict
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file


def shard(folder: Path, *, decoder: str = "model.layers.") -> None:
    """Splits `model.safetensors` into a file for each decoder layer, one for the rest, and an index."""
    whole = folder / "model.safetensors"
    parts = defaultdict(dict)
    with safe_open(whole, framework="pt") as file:
        for name in sorted(file.keys()):
            is_inside = name.startswith(decoder)
            parts[int(name.removeprefix(decoder).split(".")[0]) if is_inside else -1][name] = file.get_tensor(name)
    order = [*sorted(index for index in parts if index >= 0), -1]
    assert order[:-1] == list(range(len(order) - 1))
    files = [f"model-{number:05d}-of-{len(order):05d}.safetensors" for number in range(1, len(order) + 1)]
    for index, file in zip(order, files, strict=True):
        save_file(parts[index], folder / file, metadata={"format": "pt"})
    where = {name: file for index, file in zip(order, files, strict=True) for name in parts[index]}
    tensors = [tensor for part in parts.values() for tensor in part.values()]
    index = {
        "metadata": {"total_size": sum(tensor.numel() * tensor.element_size() for tensor in tensors)},
        "weight_map": dict(sorted(where.items())),
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    whole.unlink()


def headers_of(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (type, shape) of every tensor, as the files themselves say."""
    entries = {}
    for file in folder.glob("*.safetensors"):
        raw = file.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        entries |= json.loads(raw[8 : 8 + length])
    entries.pop("__metadata__")
    return {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()}
