"""Whether a model is packed, and how it gets 16- or 32-bit weights again."""

import torch
from bitsandbytes.nn.modules import Linear4bit
from torch import nn
from transformers import PreTrainedModel

from lightning_moe.models.channel_experts import ChannelExperts
from lightning_moe.models.discovery import moe_layers
from lightning_moe.quantization.linears import dense_weight
from lightning_moe.quantization.nf4 import unpack_experts


def is_packed(model: PreTrainedModel) -> bool:
    """Whether experts, or Linear layers around them, are in 4 bit."""
    experts = [layer.base_experts for layer in moe_layers(model)]
    return any(isinstance(module, ChannelExperts) and module.packed for module in experts) or any(
        isinstance(module, Linear4bit) for module in model.modules()
    )


@torch.no_grad()
def unpack_model(model: PreTrainedModel, *, dtype: torch.dtype) -> None:
    """Dequantises experts and Linear layers in place, one after the other; what 4 bit rounded away stays away."""
    for name, module in list(model.named_modules()):
        if isinstance(module, ChannelExperts) and module.packed:
            unpack_experts(module, dtype=dtype)
        elif isinstance(module, Linear4bit):
            model.set_submodule(name, _linear(module, dtype=dtype))


def _linear(packed: Linear4bit, *, dtype: torch.dtype) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(packed.in_features, packed.out_features, bias=False)
    linear.weight = nn.Parameter(dense_weight(packed).to(dtype), requires_grad=False)
    if packed.bias is not None:
        linear.bias = nn.Parameter(packed.bias.detach().to(dtype), requires_grad=False)
    return linear.train(packed.training)
