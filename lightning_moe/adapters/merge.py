"""Merge adapters into a plain model: dequantise first, then merge, so that nothing is rounded to 4 bit on the way."""

import torch
from bitsandbytes.nn.modules import Linear4bit
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_moe.adapters.experts import DoraExperts
from lightning_moe.adapters.functional import adapted_weight
from lightning_moe.adapters.router import DoraRouter
from lightning_moe.models.channel_experts import ChannelExperts
from lightning_moe.quantization.linears import dense_weight
from lightning_moe.quantization.nf4 import unpack_experts


@torch.no_grad()
def merge_adapters(peft_model: PeftModel, *, dtype: torch.dtype) -> PreTrainedModel:
    """Takes the adapters off and puts what they had learned into the weights; returns the base model, changed in place.

    Everything 4-bit is dequantised, so the result is a plain ragged model in `dtype` that `quantize_model` can pack
    again (`quantize_measured` says what that adds). Merging is done in fp32: in float32 the outputs equal the adapted
    model's to rounding.

    Raises:
        ValueError: `dtype` is not a floating-point type of 16 or 32 bit.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"A merged model is float32, bfloat16 or float16, got {dtype}. Merge, then call `quantize_model`."
        )
    model: PreTrainedModel = peft_model.get_base_model()  # pyright: ignore[reportAssignmentType]
    for module in list(model.modules()):
        if isinstance(module, LoraLayer):
            _merge_layer(module, dtype)
    model = peft_model.unload()  # pyright: ignore[reportAssignmentType]
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear4bit):
            model.set_submodule(name, _linear(module, dense_weight(module), dtype))
        elif isinstance(module, ChannelExperts) and module.packed:
            unpack_experts(module, dtype=dtype)
    for parameter in model.parameters():
        # Buffers (rotary frequencies, correction biases) keep their type, as they do in transformers.
        parameter.data = parameter.data.to(dtype)
    return model


def _merge_layer(layer: LoraLayer, dtype: torch.dtype) -> None:
    """Replaces the base of one adapter layer by the merged module."""
    if isinstance(layer, DoraExperts):
        layer.base_layer = layer.merged_experts(dtype=dtype)
    elif isinstance(layer, DoraRouter):
        weight = layer.adapted_weight()
        if weight is not None:
            layer.router.get_parameter("weight").data = weight
    else:
        layer.base_layer = _linear(layer.get_base_layer(), _merged_linear_weight(layer), dtype)


def _merged_linear_weight(layer: LoraLayer) -> Tensor:
    """The weight of a stock PEFT Linear layer with its active adapter, in fp32."""
    weight_oi, adapter = dense_weight(layer.get_base_layer()), layer.active_adapters[0]
    if adapter not in layer.lora_A:
        return weight_oi
    magnitudes = dict(layer.lora_magnitude_vector.named_parameters())
    A_ri, B_or = (parts[adapter].get_parameter("weight").float() for parts in (layer.lora_A, layer.lora_B))
    return adapted_weight(weight_oi, A_ri, B_or, magnitudes.get(f"{adapter}.weight"), layer.scaling[adapter])


def _linear(old: nn.Module, weight_oi: Tensor, dtype: torch.dtype) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight_oi.shape[1], weight_oi.shape[0], bias=False)
    linear.weight = nn.Parameter(weight_oi.to(dtype), requires_grad=False)
    bias = dict(old.named_parameters(recurse=False)).get("bias")
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    return linear.train(old.training)
