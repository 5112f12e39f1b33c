"""Optimizers and learning-rate schedules by name."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

OptimizerName = Literal["adamw", "adamw8bit", "paged_adamw8bit"]
ScheduleName = Literal["linear", "cosine", "constant_with_warmup"]


def build_optimizer(
    groups: Sequence[dict[str, Any]], *, name: OptimizerName, weight_decay: float, betas: tuple[float, float]
) -> Optimizer:
    """AdamW over parameter groups (each with its own `lr` and `name`).

    `adamw8bit` and `paged_adamw8bit` are bitsandbytes' 8-bit AdamW; the paged one moves its state between GPU and host
    memory and needs a GPU.

    Raises:
        ValueError: unknown name, an empty group, or the paged optimizer without a GPU.
    """
    if name not in get_args(OptimizerName):
        raise ValueError(f"`optimizer` must be one of {get_args(OptimizerName)}, got '{name}'.")
    for group in groups:
        if not group["params"]:
            raise ValueError(f"Parameter group '{group['name']}' is empty: nothing of that kind is trainable.")
    settings: dict[str, Any] = {"weight_decay": weight_decay, "betas": betas}
    if name == "adamw":
        return torch.optim.AdamW(list(groups), **settings)
    if name == "paged_adamw8bit" and not torch.cuda.is_available():
        raise ValueError("`optimizer: paged_adamw8bit` needs a GPU and none is visible. Use `adamw` or `adamw8bit`.")
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

    return (AdamW8bit if name == "adamw8bit" else PagedAdamW8bit)(list(groups), **settings)


def build_schedule(optimizer: Optimizer, *, name: ScheduleName, warmup_ratio: float, num_steps: int) -> LRScheduler:
    """Warmup over `warmup_ratio` of `num_steps` optimizer steps, then linear or cosine decay to 0, or constant.

    Raises:
        ValueError: the warmup ratio is outside [0, 1].
    """
    if not 0 <= warmup_ratio <= 1:
        raise ValueError(f"`warmup_ratio` is a share of the steps, between 0 and 1, got {warmup_ratio}.")
    return get_scheduler(
        name, optimizer, num_warmup_steps=round(warmup_ratio * num_steps), num_training_steps=num_steps
    )
