"""Pruned folders for tests: ragged in 16 bit (stored here in float32, where equality can be exact) and in NF4."""

from pathlib import Path
from typing import Any

import torch
from random_plans import random_plan
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_moe.export.huggingface import save_ragged
from lightning_moe.models.loading import load_model
from lightning_moe.quantization.linears import quantize_model
from lightning_moe.surgery.cut import apply_plan
from lightning_moe.training.tokenization import load_tokenizer

# Two groups of four experts, of which a token uses one group: one expert may go.
_GROUPED = {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
SHIPPED = "asset:small_moe"


def cut_model(name: str, *, packed: bool = False, seed: int = 0) -> PreTrainedModel:
    """A tiny model, or the shipped one in float32, with ragged widths and without expert 1 (2 in the second layer)."""
    if name == SHIPPED:
        model = load_model(SHIPPED, dtype="float32")
    else:
        model = tiny_model(name, **(_GROUPED if name.endswith("_grouped") else {}))
    apply_plan(model, plan=random_plan(model, evicted=((1,), (2,)), seed=seed))
    if packed:
        quantize_model(model)
    return model


def pruned_folder(folder: Path, name: str, *, packed: bool = False) -> str:
    """Where a cut model was saved; the shipped one with its tokenizer."""
    save_ragged(cut_model(name, packed=packed), folder)
    if name == SHIPPED:
        load_tokenizer(SHIPPED).save_pretrained(folder)
    return str(folder)


def loaded(folder: str, **settings: object) -> PreTrainedModel:
    """By stock transformers."""
    return AutoModelForCausalLM.from_pretrained(folder, **settings)


@torch.no_grad()
def logits(model: PreTrainedModel, ids_BS: torch.Tensor) -> torch.Tensor:
    """`[B, S, V]`, without a cache."""
    return model(input_ids=ids_BS, use_cache=False).logits


def put_logits(results: Any, model: PreTrainedModel, ids_BS: torch.Tensor) -> None:
    """What a spawned worker does: the model comes to it in a pickle."""
    results.put(logits(model, ids_BS).numpy())
