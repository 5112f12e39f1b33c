"""Routers of cut models: rows leave with their experts; grouped routers keep their rows and mask them.

T tokens, E experts, K experts per token, G groups, H hidden.
"""

from collections.abc import Sequence
from typing import Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter

from lightning_moe.models.families import Family


class MaskedDeepseekV2Router(DeepseekV2TopkRouter):
    """DeepSeek-V2's group-limited router without its evicted experts.

    The stock router has no selection bias to mask with, so the logits of evicted experts are set to -inf before the
    softmax, which is what removing their rows would do. The choice itself is the stock rule: groups by their best
    expert, then the top K inside them (an evicted expert scores -1, below every probability).
    """

    evicted: Tensor

    @classmethod
    def wrap(cls, router: DeepseekV2TopkRouter) -> Self:
        """A masked router with the same parameters and, so far, no evicted expert."""
        masked = cls.__new__(cls)
        nn.Module.__init__(masked)
        masked.__dict__.update({key: value for key, value in router.__dict__.items() if not key.startswith("_")})
        masked.weight = router.weight
        none_E = torch.zeros(router.num_experts, dtype=torch.bool, device=router.weight.device)
        masked.register_buffer("evicted", none_E)
        return masked.train(router.training)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`[T, H] -> logits [T, E], weights [T, K], indices [T, K]`."""
        hidden_TH = hidden_states.view(-1, self.hidden_dim)
        num_groups, groups_per_token = cast(int, self.num_group), cast(int, self.topk_group)
        logits_TE = functional.linear(hidden_TH.float(), self.weight.float()).masked_fill(self.evicted, float("-inf"))
        score_TE = logits_TE.softmax(-1).masked_fill(self.evicted, -1.0)
        score_TGe = score_TE.view(-1, num_groups, self.num_experts // num_groups)
        chosen_TG = score_TGe.amax(-1).topk(groups_per_token, dim=-1).indices
        allowed_TG = torch.zeros_like(score_TGe[..., 0], dtype=torch.bool).scatter_(1, chosen_TG, value=True)
        score_TE = score_TGe.masked_fill(~allowed_TG.unsqueeze(-1), -1.0).flatten(1)
        weights_TK, index_TK = score_TE.topk(cast(int, self.top_k), dim=-1, sorted=False)
        return logits_TE, weights_TK * self.routed_scaling_factor, index_TK


def without_adapter(module: nn.Module) -> nn.Module:
    """The module itself, without the adapter layer that may be around it (PEFT calls the inner one `base_layer`)."""
    children = dict(module.named_children())
    return without_adapter(children["base_layer"]) if "base_layer" in children else module


def row_tensor(router: nn.Module, name: str) -> Tensor:
    """A parameter or buffer of the router by its dotted name; one dimension of its shape counts experts."""
    return (dict(router.named_parameters()) | dict(router.named_buffers()))[name]


def set_row_tensor(router: nn.Module, name: str, value: Tensor) -> None:
    """Replaces a parameter (same `requires_grad`) or a buffer of the router by `value`, of any shape."""
    owner_name, _, leaf = name.rpartition(".")
    owner = router.get_submodule(owner_name)
    old = row_tensor(router, name)
    if isinstance(old, nn.Parameter):
        owner.register_parameter(leaf, nn.Parameter(value, requires_grad=old.requires_grad))
    else:
        owner.register_buffer(leaf, value)


def keep_router_rows(router: nn.Module, family: Family, kept: Sequence[int]) -> None:
    """Shrinks an ungrouped router to the experts of `kept` (ascending), in place."""
    for name, dim in family.router_rows.items():
        tensor = row_tensor(router, name)
        index = torch.tensor(list(kept), device=tensor.device)
        set_row_tensor(router, name, tensor.detach().index_select(dim, index))
    router.num_experts = len(kept)  # pyright: ignore[reportArgumentType]


def mask_router_rows(router: nn.Module, family: Family, evicted: Sequence[int]) -> nn.Module:
    """Masks experts of a grouped router so that they are never chosen; returns the router to use from now on."""
    if not evicted:
        return router
    if family.selection_bias is not None:
        bias = row_tensor(router, family.selection_bias).detach().clone()
        index = torch.tensor(list(evicted), device=bias.device)
        bias.index_fill_(family.router_rows[family.selection_bias], index, float("-inf"))
        set_row_tensor(router, family.selection_bias, bias)
        return router
    if isinstance(router, MaskedDeepseekV2Router):
        masked = router
    else:
        masked = MaskedDeepseekV2Router.wrap(cast(DeepseekV2TopkRouter, router))
    masked.evicted[list(evicted)] = True
    return masked
