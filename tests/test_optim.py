"""The fused AdamW: where it is used, and that gradients can be clipped before it steps."""

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

from lightning_moe.training.optim import build_optimizer


def test_the_fused_optimizer_clips_in_mixed_precision() -> None:
    parameter = nn.Parameter(torch.zeros(4))
    optimizer = build_optimizer(
        [{"name": "experts", "params": [parameter], "lr": 0.1}], name="adamw", weight_decay=0.0, betas=(0.9, 0.999)
    )
    assert optimizer.param_groups[0]["fused"]
    parameter.grad = torch.full((4,), 3.0)
    MixedPrecision("bf16-mixed", "cpu").clip_gradients(optimizer, clip_val=0.5)
    assert parameter.grad.norm().item() == pytest.approx(0.5, abs=1e-4)


def test_parameters_without_a_fused_kernel_are_optimised_by_the_plain_one() -> None:
    parameter = nn.Parameter(torch.zeros(4, device="meta"))
    group = {"name": "experts", "params": [parameter], "lr": 0.1}
    optimizer = build_optimizer([group], name="adamw", weight_decay=0.0, betas=(0.9, 0.999))
    assert not optimizer.param_groups[0]["fused"]
