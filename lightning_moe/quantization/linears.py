"""Stock bitsandbytes NF4 for the Linear layers around the experts: attention, shared experts, dense MLPs."""

from typing import Any, cast

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from torch import nn
from transformers import PreTrainedModel

from lightning_moe.models.channel_experts import ChannelExperts
from lightning_moe.models.discovery import moe_layers
from lightning_moe.quantization.nf4 import check_hidden_size, pack_experts
from lightning_moe.quantization.rounding import check_finite

# On CPUs with AVX512-BF16 bitsandbytes would repack the weight in place in eval mode, which then cannot be saved.
# And it would compute for ever in the type of the first input: in bfloat16 what was once run under autocast.
_BEHAVIOUR = {"support_avx512bf16_for_cpu": False, "compute_type_is_set": True}


def quantize_model(model: PreTrainedModel) -> None:
    """Puts experts (row-wise NF4) and the Linear layers around them (stock NF4, double quantised) in 4 bit, in place.

    Packed are attention, shared experts and dense MLPs. Embeddings, language-model head, routers, gates of shared
    experts and norms keep their type. Experts must be ChannelExperts already. One module is packed after the other, so
    that the memory above the shrinking model is that of one projection. Everything is frozen afterwards.

    Raises:
        ValueError: the hidden size is not a multiple of 64, or a layer still has stock experts; nothing is packed then.
    """
    check_hidden_size(int(model.config.get_text_config().hidden_size))
    cut_layers: list[ChannelExperts] = []
    for layer in moe_layers(model):
        if not isinstance(layer.experts, ChannelExperts):
            raise ValueError(
                f"'{layer.name}' has stock experts: call `convert_experts` or `apply_plan` before quantising."
            )
        cut_layers.append(layer.experts)
    for experts in cut_layers:
        pack_experts(experts)
    for name in linears_to_pack(model):
        model.set_submodule(name, pack_linear(cast(nn.Linear, model.get_submodule(name))))
    model.requires_grad_(False)


def pack_linear(linear: nn.Linear) -> Linear4bit:
    """The same layer in NF4. Params4bit quantises when it is moved to a device, its own included.

    Raises:
        ValueError: the weight holds NaN or infinity.
    """
    check_finite(linear.weight.detach(), what="A Linear layer that goes to 4 bit", advice="Look for what damaged it.")
    packed = empty_linear4bit(linear)
    packed.weight = Params4bit(
        linear.weight.detach().contiguous(),
        requires_grad=False,
        quant_type="nf4",  # pyright: ignore[reportCallIssue]: the arguments are those of __new__
        compress_statistics=True,  # pyright: ignore[reportCallIssue]
        module=packed,  # pyright: ignore[reportCallIssue]
    )
    packed.bias = linear.bias
    return packed.to(linear.weight.device).train(linear.training)


def dense_weight(linear: nn.Module) -> torch.Tensor:
    """The weight `[n, m]` of a Linear layer in fp32, dequantised where it is packed."""
    weight = linear.get_parameter("weight")
    if isinstance(weight, Params4bit):
        return dequantize_4bit(weight.data, weight.quant_state).float()
    return weight.float()


def linears_to_pack(model: PreTrainedModel) -> list[str]:
    """Names of the Linear layers that go to 4 bit.

    Those of exact type nn.Linear that are not the language-model head, not inside a router, taller than one row (the
    gate of a shared expert is a row) and made of whole blocks of 64.
    """
    head = model.get_output_embeddings()
    routers = tuple(f"{layer.router_name}." for layer in moe_layers(model))
    return [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and module is not head
        and not f"{name}.".startswith(routers)
        and module.out_features > 1
        and module.weight.numel() % 64 == 0
    ]


def empty_linear4bit(linear: nn.Linear) -> Linear4bit:
    """A Linear4bit of the same size on the meta device, with the settings this project stores."""
    with torch.device("meta"):
        packed = Linear4bit(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            compute_dtype=None,
            compress_statistics=True,
            quant_type="nf4",
            quant_storage=torch.uint8,
        )
    packed.weight.data = packed.weight.data.to(torch.uint8)
    # transformers asks the packed layer which class it replaced.
    packed.source_cls = nn.Linear  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    for attribute, value in _BEHAVIOUR.items():
        setattr(packed, attribute, value)
    packed.register_load_state_dict_pre_hook(_load_statistics)
    return packed.requires_grad_(False)


def _load_statistics(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    """Takes the block statistics along: bitsandbytes saves them in a state dict and does not load them from one."""
    weight = cast(Params4bit, module.get_parameter("weight"))
    own = f"{prefix}weight."
    statistics = {name.removeprefix(own): state_dict.pop(name) for name in list(state_dict) if name.startswith(own)}
    if statistics:
        weight.quant_state = QuantState.from_dict(statistics, device=weight.device)
        module.quant_state = weight.quant_state  # pyright: ignore[reportArgumentType]: no module
