"""Writes a checkpoint with random weights in a large model's exact shape: sharded, named and typed as hubs store it.

The default is Qwen3-30B-A3B (128 experts of 768 channels, hidden 2048, vocabulary 151,936, top 8) with `--layers` of
its 48; `--config_json` takes any other config of a supported family. Matrices are normal with variance 1 / inputs,
so that activations stay finite; channels of an expert differ in size (log-normal columns of the down projection) and
so do experts' popularities (log-normal rows of the router), so that there is something to prune. Values depend on
`--seed` and the tensor's name alone. One tensor is in memory at a time; the folder gets its name when it is whole.

    python scripts/make_synthetic_checkpoint.py --out /big/disk/qwen3_30b_7_layers --layers 7

`--fp8` stores the linear layers as FP8 checkpoints do: blocks of 128 x 128 in float8_e4m3fn, and their scales
(`weight_scale_inv`). The tokenizer beside it is the shipped small model's; its ids are valid in larger vocabularies.

O outputs, I inputs of a matrix.
"""

import argparse
import hashlib
import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, Qwen3MoeConfig
from transformers.core_model_loading import dot_natural_key, revert_weight_conversion

from lightning_moe.files import write_atomically
from lightning_moe.progress import hidden
from lightning_moe.training.tokenization import load_tokenizer

QWEN3_30B_A3B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
}
TYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float8_e4m3fn": "F8_E4M3"}
BLOCK = 128  # rows and columns of an FP8 block
FP8_MAX = 448.0
SPREAD = 0.7  # standard deviation of the log of what differs between channels and between experts
_NOT_CONVERTED = ("lm_head", "embed", "norm", ".gate.", ".router.")


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor of the checkpoint, before it has values."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_config(file: Path | None, *, num_layers: int | None) -> PreTrainedConfig:
    """The config of a file, or Qwen3-30B-A3B's, cut to its first layers."""
    config = Qwen3MoeConfig(**QWEN3_30B_A3B) if file is None else AutoConfig.from_pretrained(file)
    if num_layers is not None:
        config.update({"num_hidden_layers": num_layers})
        if getattr(config, "layer_types", None):
            config.update({"layer_types": config.layer_types[:num_layers]})
    return config


def stored_tensors(config: PreTrainedConfig, *, dtype: torch.dtype, fp8: bool) -> list[StoredTensor]:
    """What a hub stores of such a model, in the order of the layers, one tensor an expert and projection."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    tied = model.all_tied_weights_keys
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    names = sorted(stored := revert_weight_conversion(model, state), key=lambda name: _place(name))
    tensors = []
    for name in names:
        shape = tuple(stored[name].shape)
        packs = fp8 and len(shape) == 2 and not any(word in name for word in _NOT_CONVERTED)
        tensors.append(StoredTensor(name=name, shape=shape, dtype=torch.float8_e4m3fn if packs else dtype))
        if packs:
            blocks = (math.ceil(shape[0] / BLOCK), math.ceil(shape[1] / BLOCK))
            tensors.append(StoredTensor(name=f"{name}_scale_inv", shape=blocks, dtype=torch.bfloat16))
    return tensors


def _place(name: str) -> tuple[int, Any]:
    """Embeddings, layers, the rest."""
    return 0 if "embed" in name else 1 if ".layers." in name else 2, dot_natural_key(name)


def random_weight(tensor: StoredTensor, *, config: PreTrainedConfig, seed: int) -> Tensor:
    """The tensor's values in float32; see the top of the file."""
    text = config.get_text_config()
    if len(tensor.shape) == 1:
        return torch.ones(tensor.shape) if "norm" in tensor.name else torch.zeros(tensor.shape)
    digest = hashlib.sha256(f"{seed}|{tensor.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    weight = torch.randn(tensor.shape, generator=generator)
    if "embed" in tensor.name:
        return weight
    weight *= tensor.shape[-1] ** -0.5
    if ".gate." in tensor.name or ".router." in tensor.name:
        weight *= (SPREAD * torch.randn(tensor.shape[0], 1, generator=generator)).exp()
    elif ".experts." in tensor.name and tensor.shape[-2] == text.hidden_size != tensor.shape[-1]:
        weight *= (SPREAD * torch.randn(tensor.shape[-1], generator=generator)).exp()
    return weight


def to_fp8(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [O, I] and scales [ceil(O / 128), ceil(I / 128)] in bfloat16; a weight is about code times scale."""
    rows, columns = weight_OI.shape
    padded = F.pad(weight_OI, (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))  # [o, 128, i, 128]
    scale = (blocks.abs().amax((1, 3)) / FP8_MAX).clamp_min(1e-12).bfloat16()
    codes = (blocks / scale.float()[:, None, :, None]).clamp(-FP8_MAX, FP8_MAX).flatten(2).flatten(0, 1)
    return codes[:rows, :columns].to(torch.float8_e4m3fn), scale


def values(tensors: list[StoredTensor], *, config: PreTrainedConfig, seed: int) -> Iterator[Tensor]:
    """The values of the tensors, one after the other; scales follow their weight."""
    scale = torch.empty(0)
    for tensor in tensors:
        if tensor.name.endswith("_scale_inv"):
            yield scale
            continue
        weight = random_weight(tensor, config=config, seed=seed)
        if tensor.dtype == torch.float8_e4m3fn:
            weight, scale = to_fp8(weight)
        yield weight.to(tensor.dtype)


def shards_of(tensors: list[StoredTensor], *, limit: float) -> list[list[StoredTensor]]:
    """Files of at most `limit` bytes where no tensor is larger; layers cross their borders, as they do on hubs."""
    shards: list[list[StoredTensor]] = [[]]
    held = 0
    for tensor in tensors:
        if shards[-1] and held + tensor.num_bytes > limit:
            shards.append([])
            held = 0
        shards[-1].append(tensor)
        held += tensor.num_bytes
    return shards


def write_shard(path: Path, tensors: list[StoredTensor], source: Iterator[Tensor], bar: tqdm) -> None:
    """A safetensors file (8 bytes with the header's length, a JSON header, data), tensor after tensor."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.num_bytes
        dtype = TYPES[str(tensor.dtype).removeprefix("torch.")]
        header[tensor.name] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for tensor in tensors:
            file.write(next(source).contiguous().view(-1).view(torch.uint8).numpy().data)
            bar.update(tensor.num_bytes)


def write_checkpoint(
    out: Path, *, config: PreTrainedConfig, dtype: torch.dtype, fp8: bool, seed: int, shard_bytes: float
) -> None:
    """Shards, index, configs and tokenizer; the folder appears when it is whole."""
    tensors = stored_tensors(config, dtype=dtype, fp8=fp8)
    shards = shards_of(tensors, limit=shard_bytes)
    total = sum(tensor.num_bytes for tensor in tensors)
    source = values(tensors, config=config, seed=seed)
    weight_map: dict[str, str] = {}
    shown = tqdm(total=total, unit="B", unit_scale=True, desc=out.name, disable=hidden(progress=True))
    with write_atomically(out) as folder, shown as bar:
        folder.mkdir()
        for index, shard in enumerate(shards, start=1):
            name = f"model-{index:05}-of-{len(shards):05}.safetensors"
            write_shard(folder / name, shard, source, bar)
            weight_map |= {tensor.name: name for tensor in shard}
        content = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        save_config(folder, config=config, dtype=dtype, fp8=fp8)
        load_tokenizer("asset:small_moe").save_pretrained(folder)


def save_config(folder: Path, *, config: PreTrainedConfig, dtype: torch.dtype, fp8: bool) -> None:
    """`config.json`, with what FP8 checkpoints say of themselves."""
    config.dtype = dtype
    config.save_pretrained(folder)
    if not fp8:
        return
    file = folder / "config.json"
    settings: Mapping[str, Any] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
    }
    content = json.loads(file.read_text(encoding="utf-8")) | {"quantization_config": settings}
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Reads the command line and writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--layers", type=int, help="the first ones of the config's layers (default: all)")
    parser.add_argument("--config_json", type=Path, help="another model's config (default: Qwen3-30B-A3B)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--fp8", action="store_true", help="linear layers in FP8 blocks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard_gb", type=float, default=4.0, help="bytes of a file at most, in 1e9")
    args = parser.parse_args()
    if args.out.exists():
        raise SystemExit(f"'{args.out}' is there already: delete it, or choose another --out.")
    config = read_config(args.config_json, num_layers=args.layers)
    dtype = getattr(torch, args.dtype)
    write_checkpoint(
        args.out, config=config, dtype=dtype, fp8=args.fp8, seed=args.seed, shard_bytes=args.shard_gb * 1e9
    )


if __name__ == "__main__":
    main()
