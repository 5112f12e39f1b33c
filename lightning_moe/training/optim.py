"""Optimizers and learning-rate schedules by name."""

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

OptimizerName = Literal["adamw", "adamw8bit", "paged_adamw8bit"]
ScheduleName = Literal["linear", "cosine", "constant_with_warmup"]
_FUSED_DEVICES = {"cpu", "cuda"}


def check_optimizer(name: str) -> None:
    """Refuses an optimizer of another name.

    Raises:
        ValueError: with the name.
    """
    if name not in get_args(OptimizerName):
        raise ValueError(f"`optimizer` must be one of {get_args(OptimizerName)}, got '{name}'.")


def check_schedule(name: str, *, warmup_ratio: float) -> None:
    """Refuses a schedule of another name, or a warmup that is no share.

    Raises:
        ValueError: with the value.
    """
    if name not in get_args(ScheduleName):
        raise ValueError(f"`schedule` must be one of {get_args(ScheduleName)}, got '{name}'.")
    if not 0 <= warmup_ratio <= 1:
        raise ValueError(f"`warmup_ratio` is a share of the steps, between 0 and 1, got {warmup_ratio}.")


def build_optimizer(
    groups: Sequence[dict[str, Any]], *, name: OptimizerName, weight_decay: float, betas: tuple[float, float]
) -> Optimizer:
    """AdamW over parameter groups (each with its own `lr` and `name`).

    `adamw` is PyTorch's, in one fused pass over parameters, gradients and moments where the device has such a kernel.
    `adamw8bit` and `paged_adamw8bit` are bitsandbytes' 8-bit AdamW; the paged one moves its state between GPU and host
    memory and needs a GPU.

    Raises:
        ValueError: unknown name, an empty group, 8 bit under FSDP2, or the paged optimizer without a GPU.
    """
    check_optimizer(name)
    for group in groups:
        if not group["params"]:
            raise ValueError(f"Parameter group '{group['name']}' is empty: nothing of that kind is trainable.")
    settings: dict[str, Any] = {"weight_decay": weight_decay, "betas": betas}
    if name == "adamw":
        return _adamw(groups, settings)
    if any(isinstance(parameter, DTensor) for group in groups for parameter in group["params"]):
        raise ValueError(f"`optimizer: {name}` does not know FSDP2's shards. Use `adamw`, whose state is sharded too.")
    if name == "paged_adamw8bit" and not torch.cuda.is_available():
        raise ValueError("`optimizer: paged_adamw8bit` needs a GPU and none is visible. Use `adamw` or `adamw8bit`.")
    from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW8bit

    return (AdamW8bit if name == "adamw8bit" else PagedAdamW8bit)(list(groups), **settings)


def _adamw(groups: Sequence[dict[str, Any]], settings: dict[str, Any]) -> Optimizer:
    fused = {parameter.device.type for group in groups for parameter in group["params"]} <= _FUSED_DEVICES
    optimizer = torch.optim.AdamW(list(groups), fused=fused or None, **settings)
    # The fused kernel could unscale fp16 gradients as it steps, and Lightning refuses to clip for an optimizer that
    # does, in bf16 too. Without this mark the gradients are unscaled before they are clipped, as for every other.
    vars(optimizer)["_step_supports_amp_scaling"] = False
    return optimizer


def build_schedule(optimizer: Optimizer, *, name: ScheduleName, warmup_ratio: float, num_steps: float) -> LRScheduler:
    """Warmup over `warmup_ratio` of `num_steps` optimizer steps, then linear or cosine decay to 0, or constant.

    Raises:
        ValueError: unknown name, a warmup ratio outside [0, 1], or no end of training is set.
    """
    check_schedule(name, warmup_ratio=warmup_ratio)
    if not math.isfinite(num_steps):
        raise ValueError("The schedule needs the number of training steps: set `max_steps` or `max_epochs`.")
    return get_scheduler(
        name, optimizer, num_warmup_steps=round(warmup_ratio * num_steps), num_training_steps=int(num_steps)
    )
