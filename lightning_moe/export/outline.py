"""What pruning will write, before a weight is read: the cut model on the meta device.  N novices, H hidden."""

import copy
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from bitsandbytes.nn.modules import Linear4bit
from torch import nn
from transformers import PreTrainedModel

from lightning_moe.export.huggingface import quantization_config_of
from lightning_moe.models.channel_experts import PROJECTIONS, ChannelExperts
from lightning_moe.models.conversion import to_channel_experts
from lightning_moe.models.discovery import MoeLayer, moe_layers
from lightning_moe.quantization.linears import empty_linear4bit, linears_to_pack
from lightning_moe.quantization.nf4 import PackedRows
from lightning_moe.quantization.stored import StoredTensor, as_stored, packed_linear_tensors
from lightning_moe.records import PrunePlan
from lightning_moe.surgery.cut import cut_layer


def outline_of(
    model: PreTrainedModel, *, plan: PrunePlan | None, quantize: bool, novices: bool = False
) -> PreTrainedModel:
    """The model that `apply_plan` (or `convert_experts`) and `quantize_model` give, without weights.

    Args:
        model: the model on the meta device; stays as it is.
        plan: which channels stay; all without one.
        quantize: whether it is packed to 4 bit.
        novices: whether experts that go leave constants behind.
    """
    outline = copy.deepcopy(model)
    linears = linears_to_pack(outline) if quantize else []
    for layer in moe_layers(outline):
        if plan is None:
            layer.block.set_submodule(layer.family.experts, to_channel_experts(layer.experts))
        else:
            _cut(layer, plan=plan, novices=novices, dtype=outline.dtype)
        if quantize:
            _pack(layer)
    for name in linears:
        linear = outline.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        outline.set_submodule(name, empty_linear4bit(linear))
    outline.config.architectures = [type(outline).__name__]
    outline.config.dtype = str(outline.dtype).removeprefix("torch.")
    outline.config.quantization_config = quantization_config_of(outline)
    return outline.requires_grad_(False)


def write_configs(outline: PreTrainedModel, *, folder: Path) -> None:
    """`config.json` and `generation_config.json`, as `save_ragged` writes them."""
    outline.config.save_pretrained(folder)
    if outline.can_generate():
        assert outline.generation_config is not None
        outline.generation_config.save_pretrained(folder)


def stored_tensors(outline: PreTrainedModel) -> Iterator[StoredTensor]:
    """Every tensor that will be stored, a tied one once."""
    packed = {f"{name}.weight": module for name, module in outline.named_modules() if isinstance(module, Linear4bit)}
    for name, tensor in outline.state_dict().items():
        if name in outline.all_tied_weights_keys:
            continue
        if name in packed:
            shape = (packed[name].out_features, packed[name].in_features)
            yield from packed_linear_tensors(name, shape=shape, dtype=outline.dtype)
        else:
            yield as_stored(name, tensor)


def bytes_below(tensors: Sequence[StoredTensor], name: str) -> int:
    """Bytes of the tensors below a module."""
    return sum(math.prod(one.shape) * one.dtype.itemsize for one in tensors if one.name.startswith(f"{name}."))


def _cut(layer: MoeLayer, *, plan: PrunePlan, novices: bool, dtype: torch.dtype) -> None:
    num_novices = len(plan.evicted(layer.index)) if novices else 0
    empty_NH = torch.empty(num_novices, plan.shape.hidden_size, dtype=dtype, device="meta") if novices else None
    cut_layer(layer, keep_C=plan.keep[layer.index], novices_NH=empty_NH)


def _pack(layer: MoeLayer) -> None:
    experts = layer.experts
    assert isinstance(experts, ChannelExperts)
    with torch.device("meta"):
        for name in PROJECTIONS:
            setattr(experts, name, PackedRows(*experts.projection(name).shape))
