"""What can still be cut from a model: its shape before any cut, ratios counted from there, and what is refused."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from transformers import PreTrainedModel

from lightning_moe.adapters.experts import DoraExperts
from lightning_moe.adapters.router import DoraRouter
from lightning_moe.allocation.budget import block_budget, resolve_align
from lightning_moe.allocation.methods import ExpertMethod, PruningMethod
from lightning_moe.allocation.reachability import needed_per_group
from lightning_moe.models.channel_experts import ChannelExperts
from lightning_moe.models.discovery import layer_shape, model_shape, moe_layers
from lightning_moe.models.routers import without_adapter
from lightning_moe.records import LayerShape, ModelShape


def unpruned_shape(model: PreTrainedModel) -> ModelShape:
    """The shape of the model as it was loaded, before any cut."""
    return replace(model_shape(model), layers=tuple(_unpruned_layers(model)))


def remaining_ratio(model: PreTrainedModel, *, prune_ratio: float) -> float:
    """The share of the channels left now whose removal makes `prune_ratio` of the unpruned model's gone.

    0 where as much is gone already.
    """
    unpruned, present = unpruned_shape(model).num_channels, model_shape(model).num_channels
    return prune_ratio if unpruned == present else max(0.0, 1 - (1 - prune_ratio) * unpruned / present)


def check_reachable(shape: ModelShape, *, method: PruningMethod, prune_ratio: float) -> None:
    """Refuses, before training, a ratio that cannot leave every token its `top_k` experts.

    Args:
        shape: the unpruned model.
        method: whole experts leave (an `ExpertMethod`), or blocks of channels.
        prune_ratio: the largest that is asked for.

    Raises:
        ValueError: names the layer, or the whole model, and the numbers.
    """
    needed = [needed_per_group(layer) * layer.num_groups for layer in shape.layers]
    if isinstance(method, ExpertMethod):
        _check_experts(shape, needed=needed, per_layer=method.per_layer, prune_ratio=prune_ratio)
        return
    align = resolve_align(method.align, shape=shape)
    num_blocks = block_budget(shape, prune_ratio=prune_ratio, align=align)
    if num_blocks < sum(needed):
        raise ValueError(
            f"Prune ratio {prune_ratio} leaves {num_blocks} blocks of {align} channels, but {sum(needed)} experts must "
            "keep one so that each token finds its experts. Prune less, or choose a smaller `align`."
        )


def _check_experts(shape: ModelShape, *, needed: Sequence[int], per_layer: bool, prune_ratio: float) -> None:
    num_experts = [layer.num_experts for layer in shape.layers]
    if not per_layer:
        left = round((1 - prune_ratio) * sum(num_experts))
        if left < sum(needed):
            raise ValueError(
                f"Prune ratio {prune_ratio} leaves {left} of the model's {sum(num_experts)} experts, but {sum(needed)} "
                "must stay so that each token finds its experts. Prune less."
            )
        return
    for layer, count in zip(shape.layers, needed, strict=True):
        left = round((1 - prune_ratio) * layer.num_experts)
        if left < count:
            raise ValueError(
                f"{layer.name}: prune ratio {prune_ratio} leaves {left} of {layer.num_experts} experts, but "
                f"{count} must stay (top_k={layer.top_k}, num_groups={layer.num_groups}). Prune less."
            )


def check_adapters(model: PreTrainedModel) -> None:
    """Refuses layers whose experts or router are wrapped in something that we cannot cut.

    Raises:
        ValueError: with the name of the part and of what is around it.
    """
    for layer in moe_layers(model):
        parts = ((layer.name, layer.experts, DoraExperts), (layer.router_name, layer.router, DoraRouter))
        for name, part, ours in parts:
            # PEFT's `modules_to_save` calls what it wraps `original_module`.
            wrapped = without_adapter(part) is not part or "original_module" in dict(part.named_children())
            if wrapped and not isinstance(part, ours):
                raise ValueError(
                    f"'{name}' is wrapped in a {type(part).__name__}, whose parameters cannot follow a cut. Use the "
                    "adapters of `inject_adapters`, or merge it first."
                )


def _unpruned_layers(model: PreTrainedModel) -> Iterator[LayerShape]:
    for layer in moe_layers(model):
        experts, shape = layer.base_experts, layer_shape(layer)
        yield replace(shape, widths=experts.origin.widths) if isinstance(experts, ChannelExperts) else shape
