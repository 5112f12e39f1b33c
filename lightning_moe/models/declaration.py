"""Whether a family is what it was declared to be: the check for a family of your own.

T tokens, K experts per token, E experts, n channels of each, H hidden.
"""

from collections.abc import Iterator
from copy import deepcopy

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from lightning_moe.models.conversion import to_channel_experts
from lightning_moe.models.discovery import MoeLayer, moe_layers
from lightning_moe.models.router_logits import RouterOutput

_NUM_TOKENS = 32


@torch.no_grad()
def check_family(model: PreTrainedModel) -> None:
    """Compares every field of a family with a stock model of it and runs router and experts on random tokens.

    Args:
        model: not cut, in memory; a small random one shows as much as a real one.

    Raises:
        ValueError: an unknown family, or the first thing that does not fit, by name.
    """
    config = model.config.get_text_config()
    for layer in moe_layers(model):
        for problem in _problems(layer, config=config):
            raise ValueError(f"Family '{layer.family.model_type}' does not fit '{layer.block_name}': {problem}.")


def _problems(layer: MoeLayer, *, config: PretrainedConfig) -> Iterator[str]:
    """What does not fit, one by one; each check relies on those before it."""
    yield from _missing_parts(layer, config=config)
    yield from _wrong_shapes(layer, config=config)
    yield from _wrong_router_rows(layer)
    yield from _wrong_numbers(layer)


def _missing_parts(layer: MoeLayer, *, config: PretrainedConfig) -> Iterator[str]:
    family, children = layer.family, [name for name, _ in layer.block.named_children()]
    for name in (family.router, family.experts, *family.shared_experts):
        if name not in children:
            yield f"the block has no '{name}', it has {children}"
    fields = {
        "expert_width": family.expert_width,
        "expert_count": family.expert_count,
        "shared_count": family.shared_count,
        "residual_multiplier": family.residual_multiplier,
    }
    for declared, name in fields.items():
        if name is not None and name not in dir(config) and name not in config.attribute_map:
            yield f"the config has no field '{name}', which the declaration names as `{declared}`"
    weights, tensors = dict(layer.router.named_parameters()), dict(layer.experts.named_parameters())
    if "weight" not in weights or not isinstance(vars(layer.router).get("top_k"), int):
        yield f"the router must have `weight` and `top_k`, {type(layer.router).__name__} has {sorted(weights)}"
    if set(tensors) != {"gate_up_proj", "down_proj"}:
        yield f"the experts must store `gate_up_proj` and `down_proj` and nothing else, they have {sorted(tensors)}"


def _wrong_shapes(layer: MoeLayer, *, config: PretrainedConfig) -> Iterator[str]:
    num_experts, width = (int(getattr(config, name)) for name in (layer.family.expert_count, layer.family.expert_width))
    hidden_size = int(config.hidden_size)
    expected = {
        "gate_up_proj": (num_experts, 2 * width, hidden_size),
        "down_proj": (num_experts, hidden_size, width),
    }
    for name, shape in expected.items():
        found = tuple(layer.experts.get_parameter(name).shape)
        if found != shape:
            fields = f"`{layer.family.expert_count}` {num_experts}, `{layer.family.expert_width}` {width}"
            yield f"`{name}` is {list(found)} and must be {list(shape)} ({fields})"


def _wrong_router_rows(layer: MoeLayer) -> Iterator[str]:
    """Tensors with one entry per expert are those that are declared, and all in the router."""
    num_experts = len(layer.experts.get_parameter("down_proj"))
    rows, tensors = layer.family.router_rows, _tensors(layer.router)
    for name, dim in rows.items():
        if name not in tensors or tensors[name].shape[dim : dim + 1] != (num_experts,):
            has = ", ".join(f"'{other}' {list(tensor.shape)}" for other, tensor in tensors.items())
            yield f"`router_rows` says {num_experts} entries in dimension {dim} of '{name}', the router has {has}"
    others = {f"{layer.family.router}.{name}" for name in rows}
    apart = (f"{layer.family.experts}.", *(f"{name}." for name in layer.family.shared_experts))
    for name, tensor in _tensors(layer.block).items():
        if name not in others and not name.startswith(apart) and num_experts in tensor.shape:
            inside = name.startswith(f"{layer.family.router}.")
            unsaid = "and `router_rows` does not say so" if inside else "outside the router, which takes code"
            yield f"'{name}' {list(tensor.shape)} has an entry per expert too, {unsaid}"
    if layer.family.selection_bias not in (None, *rows):
        yield f"`selection_bias` '{layer.family.selection_bias}' is not in `router_rows`"


def _wrong_numbers(layer: MoeLayer) -> Iterator[str]:
    router, experts = deepcopy(layer.router).float(), deepcopy(layer.experts).float()
    hidden_size = experts.get_parameter("down_proj").shape[1]
    hidden_TH = torch.randn(_NUM_TOKENS, hidden_size, generator=torch.Generator().manual_seed(0))
    output = router(hidden_TH)
    if not isinstance(output, tuple) or [type(part) for part in output] != [Tensor] * 3:
        yield f"the router must return (logits [T, E], weights [T, K], indices [T, K]), got {type(output).__name__}"
        return
    logits_TE, weight_TK, index_TK = output
    said = RouterOutput(index=0, logits_TE=logits_TE, index_TK=index_TK, score=layer.family.score, with_gradients=False)
    ratio_TK = weight_TK / said.probability().gather(-1, index_TK)
    if not torch.allclose(ratio_TK, ratio_TK[:, :1].expand_as(ratio_TK), rtol=1e-3):
        yield f"the router's weights are not in proportion to the `{layer.family.score}` of its logits"
    expected_TH = experts(hidden_TH, index_TK, weight_TK)
    got_TH = to_channel_experts(experts)(hidden_TH, index_TK, weight_TK)
    if not torch.allclose(got_TH, expected_TH, rtol=1e-3, atol=1e-4 * float(expected_TH.abs().max())):
        yield "its experts do not compute down(act(gate) * up): they cannot be held as rows of channels"


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())
