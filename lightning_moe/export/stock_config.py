"""`config.json` of a stock checkpoint: what engines and transformers 4 read, beside the words of transformers 5."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_moe.files import read_json, write_json

# What transformers 5 keeps in `rope_parameters`, and 4 beside `rope_scaling`.
_BESIDE = ("rope_theta", "partial_rotary_factor")


def add_older_fields(folder: str | Path) -> None:
    """Completes the `config.json` of a stock checkpoint in place; see `older_fields`."""
    path = Path(folder) / "config.json"
    content = read_json(path, what="model config")
    write_json(path, content | older_fields(content))


def older_fields(content: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that transformers 4, vLLM and llama.cpp's converter look for and transformers 5 no longer writes.

    Rotary positions as `rope_theta`, `partial_rotary_factor` and, where they are scaled, `rope_scaling`; the number of
    experts of `qwen3_moe` under its published name; the type as `torch_dtype`. transformers 5 reads them too, and they
    say what its own fields say.
    """
    rope = content.get("rope_parameters") or {}
    fields = {name: rope[name] for name in _BESIDE if name in rope}
    kind = rope.get("rope_type", "default")
    if kind != "default":
        scaling = {name: value for name, value in rope.items() if name not in _BESIDE}
        fields["rope_scaling"] = {"type": kind, **scaling}
    if content.get("model_type") == "qwen3_moe" and "num_local_experts" in content:
        fields["num_experts"] = content["num_local_experts"]
    if "dtype" in content:
        fields["torch_dtype"] = content["dtype"]
    return fields
