"""Valid samples of the files that hold tensors, as small as they can be: 2 layers, 4 experts of 16 channels."""

# E experts, C channels of a layer, H hidden size

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lightning_moe.adapters.inject import AdapterConfig, inject_adapters
from lightning_moe.adapters.storage import save_adapter
from lightning_moe.calibration.hidden_states import writing_hidden_states
from lightning_moe.export.huggingface import save_ragged
from lightning_moe.export.shards import ShardedWriter
from lightning_moe.files import write_json, write_tensors
from lightning_moe.models.discovery import model_shape
from lightning_moe.quantization.linears import quantize_model
from lightning_moe.records import STATISTICS, CalibrationStatistics, PrunePlan
from lightning_moe.records.statistics import WEIGHT_NORMS
from lightning_moe.surgery.cut import apply_plan
from lightning_moe.surgery.novices import Novices
from lightning_moe.surgery.structure import structure_of
from lightning_moe.training.module import RecoveryModule
from lightning_moe.training.packing import Rows
from lightning_moe.training.teach import make_manifest
from lightning_moe.training.teacher_logits import log_prob_name, token_name

VOCAB_SIZE = 64
_CONFIG: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_GROUPED: dict[str, Any] = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}


def small_model(family: str = "qwen3_moe", *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Random weights, always the same."""
    config = CONFIG_MAPPING[family](**(_CONFIG | (_GROUPED if family == "deepseek_v3" else {})))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def cut_model(*, packed: bool = False, novices: bool = False) -> PreTrainedModel:
    """Experts of 16, 9, 4 and no channels; the last one may leave a constant."""
    model = small_model()
    shape = model_shape(model)
    keep_C = torch.cat([torch.arange(16) < width for width in (16, 9, 4, 0)])
    plan = PrunePlan(
        shape=shape, method="by_hand", prune_ratio=0.5, align=1, keep=(keep_C,) * len(shape.layers), provenance={}
    )
    rows = tuple(torch.full((1, 64), 0.5, dtype=torch.float64) for _ in shape.layers)
    apply_plan(model, plan=plan, novices=Novices(plan_digest=plan.digest, rows=rows) if novices else None)
    if packed:
        quantize_model(model)
    return model


def make_stock(folder: Path) -> None:
    """One file of weights."""
    small_model().save_pretrained(folder / "model")


def make_sharded(folder: Path) -> None:
    """A grouped router, several shards and their index."""
    small_model("deepseek_v3", dtype=torch.bfloat16).save_pretrained(folder / "model", max_shard_size="60KB")


def make_fp8(folder: Path) -> None:
    """Weights in 8-bit floating point with a factor for each 16 x 64 block."""
    make_stock(folder)
    file = folder / "model" / "model.safetensors"
    tensors: dict[str, Tensor] = load_file(file)
    for name, weight in list(tensors.items()):
        if "_proj" in name:
            tensors[name] = weight.to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.ones(-(-weight.shape[0] // 16), -(-weight.shape[1] // 64))
    save_file(tensors, file, metadata={"format": "pt"})
    config = folder / "model" / "config.json"
    settings = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [16, 64]}
    write_json(config, json.loads(config.read_text()) | {"quantization_config": settings})


def make_ragged(folder: Path) -> None:
    """A cut model in 16 bit (here 32), with novices."""
    save_ragged(cut_model(novices=True), folder / "model")


def make_nf4(folder: Path) -> None:
    """A cut model in 4 bit."""
    save_ragged(cut_model(packed=True), folder / "model")


def make_adapter(folder: Path) -> None:
    """An adapter of a cut model."""
    save_adapter(adapted_model(), folder=folder / "adapter")


def adapted_model() -> Any:
    """Adapters on experts, router and attention; never trained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return inject_adapters(cut_model(), config=AdapterConfig(expert_rank=2, router_rank=1, attention_rank=2))


def make_statistics(folder: Path) -> None:
    """Two corpora over the layers of the small model."""
    shape = model_shape(small_model())
    generator = torch.Generator().manual_seed(0)

    def numbers(size: tuple[int, ...]) -> Tensor:
        return torch.rand(size, generator=generator, dtype=torch.float64) + 0.5

    layers = tuple(
        {name: numbers(one.size(layer, hidden_size=64)) for name, one in STATISTICS.items()} for layer in shape.layers
    )
    weights = tuple({name: numbers((layer.num_channels,)) for name in WEIGHT_NORMS} for layer in shape.layers)
    statistics = CalibrationStatistics(shape=shape, corpora={"wiki": layers, "a|b": layers}, weights=weights)
    statistics.save(folder / "statistics.safetensors")


def make_hidden_states(folder: Path) -> None:
    """Three batches in three types."""
    with writing_hidden_states(folder / "hidden.bin") as append:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            append(torch.arange(48).reshape(2, 3, 8).to(dtype))


def rows_to_teach() -> Rows:
    """Five rows of six tokens."""
    tokens_NS = torch.arange(30, dtype=torch.int32).reshape(5, 6)
    return Rows(input_ids_NS=tokens_NS, length_N=torch.full((5,), 6))


def make_teacher_logits(folder: Path) -> None:
    """Three targets for each token, in shards of two rows."""
    manifest = make_manifest(
        {"wiki": rows_to_teach()}, teacher="model", quantize="none", vocab_size=VOCAB_SIZE, k=3, shard_rows=2
    )
    write_json(folder / "manifest.json", asdict(manifest))
    for first, name in manifest.shards("wiki").items():
        shard: dict[str, Tensor] = {}
        for row in manifest.rows_of("wiki", first=first):
            shard[token_name(row)] = torch.arange(18, dtype=torch.int16).reshape(6, 3)
            shard[log_prob_name(row)] = torch.full((6, 3), -2.0, dtype=torch.float16)
        write_tensors(folder / name, shard, metadata={"first_row": first})


def make_checkpoint(folder: Path) -> None:
    """What a recovery's checkpoint holds: structure, learned tensors, settings; and the source beside it."""
    make_stock(folder)
    module = RecoveryModule(source=str(folder / "model"), gradient_checkpointing=False)
    module.model = adapted_model().get_base_model()
    checkpoint: dict[str, Any] = {
        "epoch": 0,
        "global_step": 1,
        "pytorch-lightning_version": "2.6.0",
        "state_dict": module.state_dict(),
        "hyper_parameters": {"learning_rate": 1e-4},
        "callbacks": {},
    }
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, folder / "last.ckpt")


def make_structure(folder: Path) -> None:
    """A checkpoint's note on the structure of its model, as JSON."""
    write_json(folder / "structure.json", structure_of(adapted_model().get_base_model()).to_dict())


def make_shards(folder: Path) -> None:
    """The shards of an interrupted run and their digests."""
    writer = ShardedWriter(folder=folder / "model", names=("model.layers.0", "model.layers.1"))
    for index in range(writer.num_shards):
        writer.write(index, {f"part.{index}": torch.arange(6.0)})


def make_tensors(folder: Path) -> None:
    """Tensors of all kinds with metadata."""
    tensors = {
        "a": torch.arange(6.0).reshape(2, 3),
        "b": torch.arange(4, dtype=torch.int64),
        "empty": torch.empty(0, 3, dtype=torch.bfloat16),
        "scalar": torch.tensor(1.5, dtype=torch.float64),
    }
    write_tensors(folder / "file.safetensors", tensors, metadata={"record": {"kind": "any", "list": [1, 2]}})
