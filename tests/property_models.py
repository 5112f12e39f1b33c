"""Hypothesis strategies of whole models: families with different routers, random numbers of experts and widths."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from property_strategies import plan_of, seeds
from reference_moe import ROUTER_RULES, RouterRule
from tiny_models import tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from lightning_moe.models.discovery import model_shape
from lightning_moe.models.families import FAMILIES
from lightning_moe.records import PrunePlan

# One of each kind of router; `_grouped` first choose groups of experts.
UNGROUPED = ("qwen3_moe", "olmoe", "granitemoe", "deepseek_v2", "deepseek_v3", "ernie4_5_moe")
GROUPED = ("deepseek_v2_grouped", "deepseek_v3_grouped")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class ModelCase:
    """A tiny random model that can be made again, and how its router chooses."""

    name: str
    overrides: Mapping[str, Any]
    rule: RouterRule
    seed: int
    dtype: torch.dtype = torch.float32

    def model(self) -> PreTrainedModel:
        model = tiny_model(self.name, seed=self.seed, dtype=self.dtype, **self.overrides)
        model.set_experts_implementation("eager")  # the stock grouped product refuses widths that are not 16 bytes
        return model

    def plan(self, *, seed: int, share: float = 0.5) -> PrunePlan:
        return plan_of(model_shape(self.model()), seed=seed, share=share)


@st.composite
def model_cases(
    draw: st.DrawFn,
    *,
    names: tuple[str, ...] = UNGROUPED + GROUPED,
    dtypes: tuple[torch.dtype, ...] = (torch.float32,),
) -> ModelCase:
    """K from 1 to E, one expert alone, groups of one that need all of theirs; hidden 64, one or two MoE layers."""
    name = draw(st.sampled_from(names))
    family = FAMILIES[name.removesuffix("_grouped")]
    rule, groups = ROUTER_RULES[name], {}
    least = 2 if name == "deepseek_v3" else 1  # its router cannot do without two
    if name.endswith("_grouped"):
        num_groups, size = draw(st.integers(2, 3)), draw(st.integers(2, 4))
        chosen = draw(st.integers(1, num_groups))
        num_experts, most = num_groups * size, chosen * size
        groups = {"n_group": num_groups, "topk_group": chosen}
        rule = replace(rule, num_groups=num_groups, top_k_groups=chosen)
    else:
        num_experts = most = draw(st.integers(least, 8))
    overrides = groups | {
        family.expert_count: num_experts,
        family.expert_width: draw(st.sampled_from((1, 5, 8, 16))),
        "num_experts_per_tok": draw(st.integers(least, most)),
    }
    if name == "ernie4_5_moe":
        overrides["moe_k"] = overrides["num_experts_per_tok"]
    return ModelCase(name=name, overrides=overrides, rule=rule, seed=draw(seeds), dtype=draw(st.sampled_from(dtypes)))


@torch.no_grad()
def logits_of(model: PreTrainedModel, *, seed: int = 0) -> Tensor:
    ids = torch.randint(3, model.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(seed))
    return model(input_ids=ids, use_cache=False).logits


def assert_same_tensors(model: PreTrainedModel, expected: PreTrainedModel) -> None:
    """Bit for bit, under the same names."""
    mine, theirs = model.state_dict(), expected.state_dict()
    assert mine.keys() == theirs.keys()
    different = [name for name, value in theirs.items() if not torch.equal(mine[name], value)]
    assert not different
