"""What a model stores and what a token uses.  E experts of a layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bitsandbytes.nn.modules import Linear4bit
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_moe.models.channel_experts import PROJECTIONS, ChannelExperts
from lightning_moe.models.discovery import MoeLayer, expert_widths, moe_layers
from lightning_moe.models.families import is_moe
from lightning_moe.models.routers import without_adapter
from lightning_moe.quantization.nf4 import PackedRows


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Sizes of one model.

    Args:
        stored_params: logical parameters (a 4-bit weight counts as one; quantisation constants and adapters do not).
        active_params: parameters a token uses on average: everything but the routed experts, plus the channels of the
            experts it is routed to.
    """

    stored_params: int
    active_params: float


def measure_footprint(model: PreTrainedModel, *, usage: Mapping[str, Tensor] | None = None) -> Footprint:
    """Counts a model in memory.

    Args:
        model: dense, cut or packed.
        usage: name of each experts module -> share of tokens routed to each expert `[E]` (sums to top-k), as measured
            on text. Without it every expert is taken to be used equally often.
    """
    hidden_size = int(model.config.get_text_config().hidden_size)
    modules = [module for name, module in model.named_modules() if not _is_adapter(name)]
    stored = sum(_logical_size(module) for module in modules) - _tied_parameters(model)
    expert_params = active_expert_params = 0.0
    for layer in moe_layers(model) if is_moe(model.config) else []:
        widths = expert_widths(layer.base_experts)
        share_E = _uniform_usage(layer, widths) if usage is None else usage[layer.name].tolist()
        size_E = [len(PROJECTIONS) * hidden_size * width for width in widths]
        for novice in _novices(layer):
            size_E[novice] = hidden_size
        expert_params += sum(size_E)
        active_expert_params += sum(share * size for share, size in zip(share_E, size_E, strict=True))
    return Footprint(stored_params=int(stored), active_params=stored - expert_params + active_expert_params)


def missing_channels(model: PreTrainedModel) -> float:
    """Share of the routed-expert channels that the config declares and the model no longer has; 0 without experts."""
    if not is_moe(model.config):
        return 0.0
    config, layers = model.config.get_text_config(), moe_layers(model)
    family = layers[0].family
    declared = len(layers) * int(getattr(config, family.expert_count)) * int(getattr(config, family.expert_width))
    return 1 - sum(sum(expert_widths(layer.base_experts)) for layer in layers) / declared


def _uniform_usage(layer: MoeLayer, widths: Sequence[int]) -> list[float]:
    """Every expert that can be chosen, one that still has channels or a novice, is used equally often."""
    top_k = int(without_adapter(layer.router).top_k)  # pyright: ignore[reportArgumentType]
    novices = _novices(layer)
    alive = [width > 0 or expert in novices for expert, width in enumerate(widths)]
    return [top_k / sum(alive) if is_alive else 0.0 for is_alive in alive]


def _novices(layer: MoeLayer) -> tuple[int, ...]:
    """Experts whose output is a constant of H numbers."""
    experts = layer.base_experts
    return experts.novice_experts if isinstance(experts, ChannelExperts) else ()


def _is_adapter(name: str) -> bool:
    """Whether PEFT put this module beside a base layer: LoRA or DoRA parameters, or a trained copy of a norm."""
    return "lora_" in name or "modules_to_save" in name


def _logical_size(module: nn.Module) -> int:
    """Parameters that belong to this module itself, counted before packing."""
    if isinstance(module, PackedRows):
        return module.shape[0] * module.shape[1]
    if isinstance(module, Linear4bit):
        bias = 0 if module.bias is None else module.out_features
        return module.in_features * module.out_features + bias
    return sum(parameter.numel() for parameter in module.parameters(recurse=False))


def _tied_parameters(model: PreTrainedModel) -> int:
    """Parameters that `_logical_size` met once too often: a head that shares the embedding's weight."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head.weight.numel() if head is not None and head.weight is embedding.weight else 0  # pyright: ignore
