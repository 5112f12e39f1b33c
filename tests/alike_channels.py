"""Tiny models with something to repair: channels that can stand in for each other."""

from typing import Any

import torch
from tiny_models import WIDTH, tiny_model
from transformers import PreTrainedModel

from lightning_moe.models.discovery import moe_layers


def alike_model(name: str = "qwen3_moe", *, noise: float = 0.0, **options: Any) -> PreTrainedModel:
    """The second half of each expert's channels repeats the first, a little changed, and outputs count for more.

    Args:
        name: one of MODEL_NAMES.
        noise: how much else is added to the repeated gate and up rows, relative to them.
        options: as for `tiny_model`.
    """
    model = tiny_model(name, **options)
    generator = torch.Generator().manual_seed(0)
    half = WIDTH // 2
    for layer in moe_layers(model):
        for part_EnH in layer.experts.gate_up_proj.data.chunk(2, dim=1):
            first = part_EnH[:, :half]
            other = torch.randn(first.shape, generator=generator).to(first) * first.std()
            part_EnH[:, half:] = first * 1.1 + noise * other
        layer.experts.down_proj.data.mul_(5.0)
    return model
