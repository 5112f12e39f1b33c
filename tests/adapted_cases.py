"""Tiny models under adapters that are not the identity, and the same function in stock weights."""

import torch
from dora_reference import shake
from family_cases import Case
from transformers import PreTrainedModel

from lightning_moe.adapters import AdapterConfig, inject_adapters
from lightning_moe.models.discovery import moe_layers
from lightning_moe.quantization.nf4 import pack_experts
from lightning_moe.surgery.cut import convert_experts

SMALL = AdapterConfig(expert_rank=3, router_rank=2, shared_expert_rank=0)


def adapted_model(case: Case, *, packed: bool, config: AdapterConfig = SMALL, seed: int = 0) -> PreTrainedModel:
    """Experts (in 4 bit where `packed`; all else stays fp32) and routers under random adapters, in eval mode."""
    model = case.model()
    convert_experts(model)
    if packed:
        for layer in moe_layers(model):
            pack_experts(layer.experts)
    torch.manual_seed(seed)
    shake(inject_adapters(model, config=config), scale=0.05, seed=seed + 1)
    return model.eval()


def merged_stock(case: Case, adapted: PreTrainedModel) -> PreTrainedModel:
    """A stock model with the dequantised, adapted weights of an uncut adapted model."""
    stock = case.model()
    for mine, theirs in zip(moe_layers(stock), moe_layers(adapted), strict=True):
        merged = theirs.experts.merged_experts(dtype=torch.float32)
        for expert in range(merged.num_experts):
            gate_nH, up_nH, down_nH = merged.expert_matrices(expert, dtype=torch.float32)
            mine.experts.gate_up_proj.data[expert] = torch.cat([gate_nH, up_nH])
            mine.experts.down_proj.data[expert] = down_nH.T
        mine.router.weight.data = theirs.router.adapted_weight().detach()
    return stock
