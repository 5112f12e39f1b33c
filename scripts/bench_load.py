"""Loading and quantising folders: what is left beside reading bytes, and how much memory it takes.

Compared, side by side in one process, on an NF4 ragged folder with layers of Qwen3-30B-A3B's shape (128 experts of
768 channels cut to 64 to 704, hidden size 2048; quick: 4 layers, full: 12), with a warm page cache:

* a plain read of its files: `readinto` a buffer that is there already, and `Path.read_bytes`, into fresh memory;
* `safetensors.torch.load_file`, which maps the files and reads nothing, and the same with every page touched;
* stock `AutoModelForCausalLM.from_pretrained`, which maps too, and the same with every page of every tensor touched.

`reload_over_read` is the last one over the first: a model whose weights are really there, over the fastest plain read.

The full form adds the same with a cold page cache, the reload of 48 layers of hidden size 64 (all structure, few
bytes), and the peak memory of fresh processes that quantise a 16-bit folder of four such layers, layer by layer and at
once.
"""

import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from benchmarking import Settings, in_child, interleaved_seconds, parse_settings, peak_rss, report
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig

from lightning_moe.export.huggingface import save_ragged
from lightning_moe.models.channel_experts import ChannelExperts
from lightning_moe.models.discovery import moe_layers
from lightning_moe.models.loading import load_model
from lightning_moe.progress import quiet_transformers
from lightning_moe.quantization.linears import quantize_model
from lightning_moe.quantization.nf4 import PackedRows
from lightning_moe.surgery.cut import convert_experts
from lightning_moe.surgery.streaming import quantize_folder

_PAGE = 4096
_QUICK_LAYERS, _FULL_LAYERS, _STREAMED_LAYERS = 4, 12, 4
_GB = 1e9
_COLD = ("readinto", "read_bytes", "load_file, pages touched", "from_pretrained, pages touched")


def config_30b(*, num_layers: int, hidden_size: int = 2048) -> Qwen3MoeConfig:
    """Qwen3-30B-A3B's layers with a small vocabulary."""
    return Qwen3MoeConfig(
        num_hidden_layers=num_layers,
        hidden_size=hidden_size,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        num_attention_heads=max(hidden_size // 64, 4),
        num_key_value_heads=4,
        head_dim=128,
        vocab_size=4096,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["Qwen3MoeForCausalLM"],
    )


def save_packed_folder(folder: Path, config: Qwen3MoeConfig) -> None:
    """An NF4 ragged folder with random bytes: widths of 64 to 704 channels, 384 on average."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        for layer in moe_layers(model):
            widths = (64 * torch.randint(1, 12, (int(config.num_experts),), device="cpu")).tolist()
            act_fn = layer.experts.get_submodule("act_fn")
            experts = ChannelExperts(widths=widths, hidden_size=config.hidden_size, act_fn=act_fn, rows=PackedRows)
            layer.block.set_submodule("experts", experts)
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        _ = tensor.random_(0, 256) if tensor.dtype == torch.uint8 else tensor.data.normal_(0, 0.02)
    quantize_model(model)
    with quiet_transformers():
        save_ragged(model, folder)


def touch(tensors: Iterable[Tensor]) -> int:
    """Reads one byte of every page."""
    flat = (tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in tensors if tensor.numel())
    return sum(int(byte[::_PAGE].sum()) for byte in flat)


def reload(folder: Path) -> PreTrainedModel:
    """What a user runs."""
    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(folder)


def ways_to_load(folder: Path) -> dict[str, Callable[[], object]]:
    """Name -> one way to get the folder's weights."""
    files = sorted(folder.glob("*.safetensors"))

    buffers = [(file, bytearray(file.stat().st_size)) for file in files]

    def read_into() -> None:
        for file, buffer in buffers:
            with file.open("rb", buffering=0) as opened:
                opened.readinto(buffer)

    def touched_files() -> None:
        loaded = [load_file(file) for file in files]
        touch(tensor for tensors in loaded for tensor in tensors.values())

    def touched_model() -> None:
        model = reload(folder)
        touch([*model.parameters(), *model.buffers()])

    return {
        "readinto": read_into,
        "read_bytes": lambda: [file.read_bytes() for file in files],
        "load_file": lambda: [load_file(file) for file in files],
        "load_file, pages touched": touched_files,
        "from_pretrained": lambda: reload(folder),
        "from_pretrained, pages touched": touched_model,
    }


def measure_reload(*, num_layers: int, repeats: int) -> tuple[list[dict[str, object]], float]:
    """Rows of the table, and `reload_over_read`."""
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / "packed"
        save_packed_folder(folder, config_30b(num_layers=num_layers))
        seconds = interleaved_seconds(ways_to_load(folder), repeats=repeats)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    what = f"{num_layers} layers, {size / _GB:.2f} GB"
    return _rows(what, seconds), seconds["from_pretrained, pages touched"] / seconds["readinto"]


def _rows(what: str, seconds: Mapping[str, float]) -> list[dict[str, object]]:
    base = seconds["readinto"]
    return [
        {"what": what, "way": way, "ms": f"{1e3 * value:.1f}", "over readinto": f"{value / base:.2f}"}
        for way, value in seconds.items()
    ]


def measure_cold(*, num_layers: int, repeats: int) -> list[dict[str, object]]:
    """The same from the disk: the kernel is asked to forget the files before each run."""
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / "packed"
        save_packed_folder(folder, config_30b(num_layers=num_layers))
        ways = {way: run for way, run in ways_to_load(folder).items() if way in _COLD}
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(repeats):
            for way, run in ways.items():
                _forget(folder)
                start = time.perf_counter()
                run()
                seconds[way].append(time.perf_counter() - start)
    return _rows(f"{num_layers} layers, cold cache", {way: statistics.median(own) for way, own in seconds.items()})


def _forget(folder: Path) -> None:
    gc.collect()  # pages that a dead model still maps would stay
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure_depth(*, repeats: int) -> list[dict[str, object]]:
    """48 layers of 128 experts with hidden size 64: the cost of structure."""
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / "packed"
        save_packed_folder(folder, config_30b(num_layers=48, hidden_size=64))
        ways = {way: run for way, run in ways_to_load(folder).items() if way in _COLD}
        return _rows("48 layers, hidden 64", interleaved_seconds(ways, repeats=repeats))


def save_stock_folder(folder: Path, config: Qwen3MoeConfig) -> int:
    """A 16-bit checkpoint as hubs store it, one shard a layer; returns the bytes of one layer's experts."""
    config.save_pretrained(folder)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items() if ".experts." not in name}
    sides = {"gate_proj": (768, 2048), "up_proj": (768, 2048), "down_proj": (2048, 768)}
    weight_map: dict[str, str] = {}
    layer_bytes = 0
    for index in range(int(config.num_hidden_layers) + 1):
        prefix = f"model.layers.{index}."
        own = {
            name: shape
            for name, shape in shapes.items()
            if name.startswith(prefix) or index == config.num_hidden_layers
        }
        shapes = {name: shape for name, shape in shapes.items() if name not in own}
        experts = range(int(config.num_experts)) if index < config.num_hidden_layers else ()
        routed = {f"{prefix}mlp.experts.{e}.{side}.weight": shape for e in experts for side, shape in sides.items()}
        tensors = {
            name: torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02) for name, shape in (own | routed).items()
        }
        layer_bytes = max(layer_bytes, sum(tensors[name].nbytes for name in routed))
        save_file(tensors, folder / f"model-{index}.safetensors", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, f"model-{index}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return layer_bytes


def quantise(*, folder: str, stream: bool) -> dict[str, float]:
    """Runs in a fresh process: bytes at the start, at the peak, and of the result, and seconds."""
    before, start = peak_rss(), time.perf_counter()
    if stream:
        model = quantize_folder(folder)
    else:
        model = load_model(folder)
        convert_experts(model)
        quantize_model(model)
    seconds, peak = time.perf_counter() - start, peak_rss()
    packed = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    return {"before": before, "peak": peak, "packed": packed, "seconds": seconds}


def measure_streaming(*, num_layers: int) -> list[str]:
    """Lines on the memory of packing a 16-bit folder, by layers and at once."""
    with TemporaryDirectory() as scratch:
        layer_bytes = save_stock_folder(Path(scratch), config_30b(num_layers=num_layers))
        found = {
            name: in_child(quantise, folder=scratch, stream=name == "by layers") for name in ("by layers", "at once")
        }
    lines = [f"Quantising {num_layers} layers from 16 bit; one layer's experts in 16 bit: {layer_bytes / _GB:.2f} GB."]
    for name, run in found.items():
        extra = run["peak"] - run["before"] - run["packed"]
        lines.append(
            f"{name}: peak {run['peak'] / _GB:.2f} GB = {run['before'] / _GB:.2f} GB libraries + "
            f"{run['packed'] / _GB:.2f} GB packed model + {extra / _GB:.2f} GB ({extra / layer_bytes:.2f} layers), "
            f"{run['seconds']:.0f} s"
        )
    return lines


def main(settings: Settings) -> None:
    """Prints the table and writes the JSON."""
    num_layers, repeats = (_QUICK_LAYERS, 3) if settings.quick else (_FULL_LAYERS, 7)
    rows, ratio = measure_reload(num_layers=num_layers, repeats=repeats)
    notes = [
        "Warm page cache; medians of interleaved runs. `reload_over_read`: from_pretrained, pages touched / readinto."
    ]
    if not settings.quick:
        rows += measure_cold(num_layers=num_layers, repeats=5) + measure_depth(repeats=repeats)
        notes += measure_streaming(num_layers=_STREAMED_LAYERS)
    report(
        settings=settings,
        title="Loading NF4 ragged folders",
        rows=rows,
        ratios={"reload_over_read": ratio},
        notes=notes,
    )


if __name__ == "__main__":
    main(parse_settings(__doc__))
