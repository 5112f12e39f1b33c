"""The supported model families, each declared once.

A family says which class is its MoE block and what sits inside it. Nothing here guesses: a model type that is not in
`FAMILIES` is refused with the list of those that are.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from torch import nn
from transformers import PretrainedConfig


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model family: where its router and experts are, and what its router's numbers mean.

    Args:
        model_type: `config.model_type` of the language model.
        block_class: dotted path of the MoE block's class below `transformers.models`.
        router: attribute of the block that returns `(logits [T, E], weights [T, K], indices [T, K])`.
        experts: attribute of the block with the routed experts.
        shared_experts: attributes of the block with gated MLPs every token uses (never pruned).
        router_rows: tensors of the router with one entry per expert, and the dimension of that entry.
        selection_bias: the router tensor that is added to the scores before the choice; `-inf` masks an expert.
        score: how logits become the probabilities the experts are chosen by.
        router_groups: how experts are grouped before the choice: by the sum of each group's two best (`top2_sum`), by
            its best (`best`, only under `topk_method: group_limited_greedy`), or not at all.
        attention: names of the Linear layers of the attention (of each kind the family has).
        residual_multiplier: config field the block's output is multiplied with before the residual sum, if any.
        expert_width: config field with the channels of an expert.
        expert_count: config field with the number of routed experts.
        shared_count: config field that, times `expert_width`, is the width of the shared experts (None: a field of
            their own, or no shared experts).
    """

    model_type: str
    block_class: str
    router: str = "gate"
    experts: str = "experts"
    shared_experts: tuple[str, ...] = ()
    router_rows: Mapping[str, int] = field(default_factory=lambda: {"weight": 0})
    selection_bias: str | None = None
    score: Literal["softmax", "sigmoid"] = "softmax"
    router_groups: Literal["none", "top2_sum", "best"] = "none"
    attention: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    residual_multiplier: str | None = None
    expert_width: str = "moe_intermediate_size"
    expert_count: str = "num_experts"
    shared_count: str | None = None

    def load_block_class(self) -> type[nn.Module]:
        """The class of the MoE block, imported from transformers."""
        module, name = self.block_class.rsplit(".", 1)
        return getattr(importlib.import_module(f"transformers.models.{module}"), name)

    def output_scale(self, config: PretrainedConfig) -> float:
        """Factor between the routed sum and its share of the residual stream (1 for most families)."""
        return float(getattr(config, self.residual_multiplier)) if self.residual_multiplier else 1.0


_BIASED = {"weight": 0, "e_score_correction_bias": 0}
_LATENT_ATTENTION = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
# Sigmoid scores, a bias for the choice alone, groups ranked by their two best experts, one shared expert beside them.
_routed_as_deepseek_v3 = partial(
    Family,
    shared_experts=("shared_experts",),
    router_rows=_BIASED,
    selection_bias="e_score_correction_bias",
    score="sigmoid",
    router_groups="top2_sum",
    expert_count="n_routed_experts",
    shared_count="n_shared_experts",
)

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            model_type="qwen2_moe",
            block_class="qwen2_moe.modeling_qwen2_moe.Qwen2MoeSparseMoeBlock",
            shared_experts=("shared_expert",),
        ),
        Family(model_type="qwen3_moe", block_class="qwen3_moe.modeling_qwen3_moe.Qwen3MoeSparseMoeBlock"),
        Family(
            model_type="qwen3_next",
            block_class="qwen3_next.modeling_qwen3_next.Qwen3NextSparseMoeBlock",
            shared_experts=("shared_expert",),
            attention=("q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkvz", "in_proj_ba", "out_proj"),
        ),
        Family(
            model_type="mixtral",
            block_class="mixtral.modeling_mixtral.MixtralSparseMoeBlock",
            expert_width="intermediate_size",
            expert_count="num_local_experts",
        ),
        Family(
            model_type="olmoe",
            block_class="olmoe.modeling_olmoe.OlmoeSparseMoeBlock",
            expert_width="intermediate_size",
        ),
        Family(
            model_type="granitemoe",
            block_class="granitemoe.modeling_granitemoe.GraniteMoeMoE",
            router="router",
            residual_multiplier="residual_multiplier",
            expert_width="intermediate_size",
            expert_count="num_local_experts",
        ),
        Family(
            model_type="deepseek",
            block_class="deepseek_ocr2.modeling_deepseek_ocr2.DeepseekOcr2TextMoe",
            shared_experts=("shared_experts",),
            expert_count="n_routed_experts",
            shared_count="n_shared_experts",
        ),
        Family(
            model_type="deepseek_v2",
            block_class="deepseek_v2.modeling_deepseek_v2.DeepseekV2Moe",
            shared_experts=("shared_experts",),
            attention=_LATENT_ATTENTION,
            router_groups="best",
            expert_count="n_routed_experts",
            shared_count="n_shared_experts",
        ),
        _routed_as_deepseek_v3(
            model_type="deepseek_v3",
            block_class="deepseek_v3.modeling_deepseek_v3.DeepseekV3MoE",
            attention=_LATENT_ATTENTION,
        ),
        _routed_as_deepseek_v3(model_type="glm4_moe", block_class="glm4_moe.modeling_glm4_moe.Glm4MoeMoE"),
        Family(
            model_type="ernie4_5_moe",
            block_class="ernie4_5_moe.modeling_ernie4_5_moe.Ernie4_5_MoeSparseMoeBlock",
            shared_experts=("shared_experts",),
            router_rows={"weight": 0, "moe_statics.e_score_correction_bias": 1},
            selection_bias="moe_statics.e_score_correction_bias",
            expert_count="moe_num_experts",
            shared_count="moe_num_shared_experts",
        ),
    )
}

REFUSED: dict[str, str] = {
    "gpt_oss": "its experts have bias terms and store gate and up interleaved and transposed",
    "aria_text": "its expert weights are stored transposed",
    "nemotron_h": "its experts have no gate projection",
    "llama4_text": "its experts do not follow transformers' common experts signature",
    "dbrx": "its experts do not follow transformers' common experts signature",
}


def register_family(family: Family) -> None:
    """Adds a family of your own, for this process; `lightning_moe.models.declaration.check_family` checks it.

    Raises:
        ValueError: the model type is declared otherwise or refused already, or transformers has no such class.
    """
    if FAMILIES.get(family.model_type) == family:
        return
    if family.model_type in {**FAMILIES, **REFUSED}:
        state = "declared" if family.model_type in FAMILIES else "refused"
        raise ValueError(f"Model type '{family.model_type}' is {state} already, in `lightning_moe/models/families.py`.")
    try:
        family.load_block_class()
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"`block_class` must be the dotted path of a class below `transformers.models`, such as "
            f"'qwen3_moe.modeling_qwen3_moe.Qwen3MoeSparseMoeBlock', got '{family.block_class}': {error}."
        ) from error
    FAMILIES[family.model_type] = family


def is_moe(config: PretrainedConfig) -> bool:
    """Whether a config is of a known Mixture-of-Experts family; False for a plain dense model."""
    return config.get_text_config().model_type in FAMILIES


def family_of(config: PretrainedConfig) -> Family:
    """The family of a language model's config.

    Raises:
        ValueError: the model type is refused (with the reason) or unknown (with the list of known ones).
    """
    model_type = config.model_type
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    known = ", ".join(sorted(FAMILIES))
    if model_type in REFUSED:
        raise ValueError(f"Model type '{model_type}' is not supported: {REFUSED[model_type]}. Supported: {known}.")
    raise ValueError(f"Model type '{model_type}' is not a known Mixture-of-Experts family. Supported: {known}.")
