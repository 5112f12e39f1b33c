"""Pruning layer by layer and, as its reference, by the whole model in memory, for the tests of both."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tiny_models import random_tokens

from lightning_moe.export.folders import open_folder
from lightning_moe.export.huggingface import save_ragged
from lightning_moe.export.streaming import prune_folder
from lightning_moe.models.loading import load_model
from lightning_moe.quantization.linears import quantize_model
from lightning_moe.surgery.cut import apply_plan, convert_experts
from lightning_moe.surgery.novices import Novices
from lightning_moe.surgery.repair import plan_repair

SHARD = "60KB"  # a tiny model in about ten files


def text(*, batches=2, batch=4, length=32):
    """Two corpora, one with padding."""
    found = {"a": [], "b": []}
    for index in range(batches):
        ids = random_tokens(batch=batch, length=length, seed=index)
        mask = torch.ones_like(ids)
        mask[0, -5 - index :] = 0
        found["a"].append({"input_ids": ids})
        found["b"].append({"input_ids": ids.flip(1), "attention_mask": mask})
    return found


def random_novices(plan, *, hidden_size=64):
    generator = torch.Generator().manual_seed(0)
    counts = [len(plan.evicted(index)) for index in range(len(plan.keep))]
    rows = tuple(torch.randn(count, hidden_size, generator=generator, dtype=torch.float64) for count in counts)
    return Novices(plan_digest=plan.digest, rows=rows)


def prune_whole(source: str, out: Path, *, plan, quantize, repair: Any = False, novices=None, dtype: Any = "auto"):
    """The same with the whole model in memory; says how many experts were repaired."""
    model = load_model(source, dtype=dtype)
    convert_experts(model)
    refit = None
    if repair:
        options = {"plan": plan, "loaders": text(), "after_nf4": repair == "after_nf4", "progress": False}
        refit = plan_repair(model, **options)
    if plan is not None:
        apply_plan(model, plan=plan, repair=refit, novices=novices)
    if quantize:
        quantize_model(model)
    save_ragged(model, out)
    return 0 if refit is None else sum(refit.num_repaired)


def prune_streamed(source: str, out: Path, *, dtype: Any = "auto", **options: Any) -> None:
    prune_folder(open_folder(source, dtype=dtype), out=out, loaders=text(), progress=False, **options)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def assert_same_folder(found: Path, expected: Path) -> None:
    """Every tensor and both configs."""
    own, other = tensors_of(found), tensors_of(expected)
    assert own.keys() == other.keys()
    for name, value in other.items():
        assert own[name].dtype == value.dtype, name
        assert torch.equal(own[name], value), name
    for name in ("config.json", "generation_config.json"):
        assert (found / name).read_text() == (expected / name).read_text()


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
