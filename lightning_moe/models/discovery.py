"""Find the MoE layers of a model and describe their shape.  E experts, I channels per stock expert, H hidden."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_moe.models.channel_experts import ChannelExperts
from lightning_moe.models.families import Family, family_of
from lightning_moe.models.routers import without_adapter
from lightning_moe.records import LayerShape, ModelShape


@dataclass(frozen=True, kw_only=True)
class MoeLayer:
    """One MoE layer of a model: its modules and their names.

    Args:
        index: position among the MoE layers.
        name: full name of the experts module (stock or ChannelExperts).
        block_name: full name of the MoE block.
    """

    index: int
    name: str
    block_name: str
    family: Family
    decoder_layer: nn.Module
    block: nn.Module

    @property
    def router(self) -> nn.Module:
        """The router that the block calls (an adapter around it, if there is one)."""
        return self.block.get_submodule(self.family.router)

    @property
    def experts(self) -> nn.Module:
        """The experts that the block calls (an adapter around them, if there is one)."""
        return self.block.get_submodule(self.family.experts)

    @property
    def base_experts(self) -> nn.Module:
        """The experts themselves, without the adapter that may be around them."""
        return without_adapter(self.experts)

    @property
    def router_name(self) -> str:
        """Full name of the router."""
        return f"{self.block_name}.{self.family.router}"

    @property
    def shared_names(self) -> tuple[str, ...]:
        """Full names of the shared experts that this block really has."""
        children = dict(self.block.named_children())
        return tuple(f"{self.block_name}.{name}" for name in self.family.shared_experts if name in children)


def find_language_model(module: nn.Module) -> PreTrainedModel:
    """The one transformers model held anywhere inside `module` (a LightningModule, say).

    Raises:
        ValueError: there is none, or more than one.
    """
    found: list[PreTrainedModel] = []
    inside: set[int] = set()
    for candidate in module.modules():
        if isinstance(candidate, PreTrainedModel) and id(candidate) not in inside:
            found.append(candidate)
            inside.update(id(child) for child in candidate.modules())
    if len(found) != 1:
        raise ValueError(
            f"Expected exactly one transformers model inside {type(module).__name__}, found {len(found)}. "
            "Make it an attribute of the module, in `__init__` or in `configure_model`."
        )
    return found[0]


def moe_layers(model: PreTrainedModel) -> list[MoeLayer]:
    """The MoE layers of a model, in the order of the decoder.

    Raises:
        ValueError: unknown family, or no MoE layer in the model.
    """
    config = model.config.get_text_config()
    family = family_of(config)
    block_class = family.load_block_class()
    modules = dict(model.named_modules())
    blocks = [(name, module) for name, module in modules.items() if isinstance(module, block_class)]
    if not blocks:
        raise ValueError(f"This '{family.model_type}' model has no MoE layer: every layer of its config is dense.")
    return [
        MoeLayer(
            index=index,
            name=f"{name}.{family.experts}",
            block_name=name,
            family=family,
            decoder_layer=modules[name.rpartition(".")[0]],
            block=block,
        )
        for index, (name, block) in enumerate(blocks)
    ]


def decoder_names(model: PreTrainedModel) -> list[str]:
    """Full names of the decoder layers, dense ones included, first layer first.

    Raises:
        ValueError: unknown family, or no MoE layer in the model.
    """
    decoder = moe_layers(model)[0].block_name.rpartition(".")[0].rpartition(".")[0]
    return [f"{decoder}.{name}" for name, _ in model.get_submodule(decoder).named_children()]


def expert_widths(experts: nn.Module) -> tuple[int, ...]:
    """Channels of each expert, in the router's order; `experts` is a stock module or ChannelExperts, or adapted."""
    experts = without_adapter(experts)
    if isinstance(experts, ChannelExperts):
        return experts.widths
    num_experts, _, width = experts.down_proj.shape  # pyright: ignore[reportCallIssue, reportGeneralTypeIssues]
    return (int(width),) * int(num_experts)


def expert_matrices(experts: nn.Module, expert: int, *, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Gate, up and transposed down projection of one expert, each `[n, H]`: views where the storage allows."""
    if isinstance(experts, ChannelExperts):
        return experts.expert_matrices(expert, dtype=dtype)
    gate_up: Tensor = experts.get_parameter("gate_up_proj")[expert]
    down: Tensor = experts.get_parameter("down_proj")[expert]
    gate_nH, up_nH = gate_up.chunk(2)
    return gate_nH.to(dtype), up_nH.to(dtype), down.T.to(dtype)


def model_shape(model: PreTrainedModel) -> ModelShape:
    """What a statistics file or a plan must match: names, widths, routing, and a digest of the router weights."""
    layers = moe_layers(model)
    digest = hashlib.sha256()
    for layer in layers:
        weight: Tensor = without_adapter(layer.router).get_parameter("weight")
        if weight.device.type != "meta":
            rounded = weight.detach().to(device="cpu", dtype=torch.bfloat16).contiguous()
            digest.update(rounded.view(torch.uint8).numpy().tobytes())
    config = model.config.get_text_config()
    return ModelShape(
        model_type=layers[0].family.model_type,
        hidden_size=int(config.hidden_size),
        layers=tuple(layer_shape(layer) for layer in layers),
        router_digest=digest.hexdigest(),
    )


def layer_shape(layer: MoeLayer) -> LayerShape:
    """Widths and routing of one layer."""
    router = without_adapter(layer.router)
    grouped = is_grouped(layer)
    return LayerShape(
        name=layer.name,
        widths=expert_widths(layer.experts),
        top_k=int(router.top_k),  # pyright: ignore[reportArgumentType]
        num_groups=int(router.num_group) if grouped else 1,  # pyright: ignore[reportArgumentType]
        top_k_groups=int(router.topk_group) if grouped else 1,  # pyright: ignore[reportArgumentType]
    )


def is_grouped(layer: MoeLayer) -> bool:
    """Whether the router first chooses groups of experts (then evicted experts are masked, not removed)."""
    router = without_adapter(layer.router)
    match layer.family.router_groups:
        case "none":
            return False
        case "best":
            return router.topk_method == "group_limited_greedy" and int(router.num_group) > 1  # pyright: ignore
        case "top2_sum":
            return int(router.num_group) > 1  # pyright: ignore[reportArgumentType]
