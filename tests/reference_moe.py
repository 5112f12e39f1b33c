"""An independent reference of a cut model: the stock model with zeroed channels and routers written out by hand."""

# T tokens, K experts per token, E experts, G router groups, H hidden

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_moe.models.discovery import moe_layers
from lightning_moe.records import PrunePlan


@dataclass(frozen=True, kw_only=True)
class RouterRule:
    """How a family's router chooses and weights, copied from its paper or published code."""

    score: Literal["softmax", "sigmoid"] = "softmax"
    normalised: bool = False
    scale: float = 1.0
    bias: str | None = None
    num_groups: int = 1
    top_k_groups: int = 1
    group_score: Literal["best", "top2_sum"] = "best"

    def route(self, router: nn.Module, hidden_TH: Tensor, *, evicted: list[int], top_k: int) -> tuple[Tensor, ...]:
        """Logits `[T, E]`, weights `[T, K]`, indices `[T, K]`."""
        tensors = dict(router.named_parameters()) | dict(router.named_buffers())
        hidden_TH = hidden_TH.reshape(-1, hidden_TH.shape[-1])
        logits_TE = hidden_TH @ tensors["weight"].T
        logits_TE[:, evicted] = float("-inf")
        score_TE = logits_TE.softmax(-1) if self.score == "softmax" else logits_TE.sigmoid()
        choice_TE = score_TE if self.bias is None else score_TE + tensors[self.bias].flatten()
        choice_TE = choice_TE.clone()
        choice_TE[:, evicted] = float("-inf")
        if self.num_groups > 1:
            choice_TE = self._within_groups(choice_TE)
        index_TK = choice_TE.topk(top_k, dim=-1).indices
        weights_TK = score_TE.gather(1, index_TK)
        if self.normalised:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return logits_TE, weights_TK * self.scale, index_TK

    def _within_groups(self, choice_TE: Tensor) -> Tensor:
        masked = []
        for row_E in choice_TE:
            groups = row_E.chunk(self.num_groups)
            best = [sorted(group.tolist(), reverse=True) for group in groups]
            ranks = [values[0] if self.group_score == "best" else sum(values[:2]) for values in best]
            chosen = sorted(range(self.num_groups), key=lambda g: -ranks[g])[: self.top_k_groups]
            lost = torch.full_like(groups[0], float("-inf"))
            masked.append(torch.cat([group if g in chosen else lost for g, group in enumerate(groups)]))
        return torch.stack(masked)


_V3 = RouterRule(score="sigmoid", normalised=True, scale=1.5, bias="e_score_correction_bias")
_V3_GROUPED = RouterRule(
    score="sigmoid",
    normalised=True,
    scale=1.5,
    bias="e_score_correction_bias",
    num_groups=2,
    top_k_groups=1,
    group_score="top2_sum",
)

ROUTER_RULES: dict[str, RouterRule] = {
    "qwen2_moe": RouterRule(),
    "qwen2_moe_normalised": RouterRule(normalised=True),
    "qwen3_moe": RouterRule(normalised=True),
    "qwen3_next": RouterRule(normalised=True),
    "mixtral": RouterRule(normalised=True),
    "olmoe": RouterRule(),
    "granitemoe": RouterRule(normalised=True),
    "deepseek": RouterRule(),
    "deepseek_v2": RouterRule(scale=1.5),
    "deepseek_v2_grouped": RouterRule(scale=1.5, num_groups=2, top_k_groups=1),
    "deepseek_v3": _V3,
    "deepseek_v3_grouped": _V3_GROUPED,
    "glm4_moe": _V3,
    "glm4_moe_grouped": _V3_GROUPED,
    "ernie4_5_moe": RouterRule(normalised=True, bias="moe_statics.e_score_correction_bias"),
}


def mask_stock_model(model: PreTrainedModel, *, rule: RouterRule, plan: PrunePlan | None) -> PreTrainedModel:
    """Zeroes the channels that a plan cuts and takes over the routing, in place; returns the model."""
    for layer in moe_layers(model):
        gate_up, down = layer.experts.get_parameter("gate_up_proj"), layer.experts.get_parameter("down_proj")
        keep_En = torch.ones(down.shape[0], down.shape[2], dtype=torch.bool)
        if plan is not None:
            keep_En = plan.keep[layer.index].view_as(keep_En)
        gate_up.data *= torch.cat([keep_En, keep_En], dim=1).unsqueeze(-1)
        down.data *= keep_En.unsqueeze(1)
        evicted = (~keep_En.any(1)).nonzero().flatten().tolist()
        layer.router.forward = _routing(rule, layer.router, evicted)  # type: ignore[method-assign]
    return model


def _routing(rule: RouterRule, router: nn.Module, evicted: list[int]) -> Callable[[Tensor], tuple[Tensor, ...]]:
    top_k = int(router.top_k)
    return lambda hidden_TH: rule.route(router, hidden_TH, evicted=evicted, top_k=top_k)
