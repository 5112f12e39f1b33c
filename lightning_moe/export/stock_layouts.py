"""The checkpoint of each family as vLLM's loader and llama.cpp's converter look for it: tensors and config fields.

Written down by hand from what both read, family by family, and not derived from the model that is saved: a tensor that
transformers renamed on the way, a field that its config dropped, would show. Both know all families of `LAYOUTS`.

In shapes: V vocabulary, H hidden, Q and K queries and keys of all heads, D one head, E experts, N channels of an
expert, S of the shared experts, I of a dense layer; words for latent and linear attention (`stock_keys.sizes_of`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Shapes = Mapping[str, tuple[str | int, ...]]
Rule = Literal["all", "sparse_step", "first_dense", "interval"]
# Families that transformers does not know by itself, and what that means for a stock export.
NOT_NATIVE: Mapping[str, str] = {
    "deepseek": (
        "transformers has no `deepseek` model of its own: load it with `import lightning_moe`, with the published "
        "model's code, or in an engine that knows it"
    )
}
_QUERIES: Shapes = {
    "self_attn.q_proj.weight": ("Q", "H"),
    "self_attn.k_proj.weight": ("K", "H"),
    "self_attn.v_proj.weight": ("K", "H"),
    "self_attn.o_proj.weight": ("H", "Q"),
}
_BIASES: Shapes = {
    "self_attn.q_proj.bias": ("Q",),
    "self_attn.k_proj.bias": ("K",),
    "self_attn.v_proj.bias": ("K",),
    "self_attn.o_proj.bias": ("H",),
}
_HEAD_NORMS: Shapes = {"self_attn.q_norm.weight": ("D",), "self_attn.k_norm.weight": ("D",)}
_ALL_NORMS: Shapes = {"self_attn.q_norm.weight": ("Q",), "self_attn.k_norm.weight": ("K",)}
_LATENT: Shapes = {
    "self_attn.kv_a_proj_with_mqa.weight": ("latent+rope", "H"),
    "self_attn.kv_a_layernorm.weight": ("latent",),
    "self_attn.kv_b_proj.weight": ("latent_kv", "latent"),
    "self_attn.o_proj.weight": ("H", "latent_v"),
}
# Queries of latent attention, without and with a rank of their own.
PLAIN_QUERIES: Shapes = {"self_attn.q_proj.weight": ("latent_q", "H")}
LOW_RANK_QUERIES: Shapes = {
    "self_attn.q_a_proj.weight": ("q_rank", "H"),
    "self_attn.q_a_layernorm.weight": ("q_rank",),
    "self_attn.q_b_proj.weight": ("latent_q", "q_rank"),
}
_GATED_QUERIES: Shapes = {**_QUERIES, "self_attn.q_proj.weight": ("2Q", "H"), **_HEAD_NORMS}
LINEAR_ATTENTION: Shapes = {
    "linear_attn.A_log": ("linear_heads",),
    "linear_attn.dt_bias": ("linear_heads",),
    "linear_attn.conv1d.weight": ("linear_qkv", 1, "kernel"),
    "linear_attn.in_proj_qkvz.weight": ("linear_qkvz", "H"),
    "linear_attn.in_proj_ba.weight": ("2linear_heads", "H"),
    "linear_attn.norm.weight": ("linear_head",),
    "linear_attn.out_proj.weight": ("H", "linear_v"),
}
_PER_EXPERT: Shapes = {"gate_proj": ("N", "H"), "up_proj": ("N", "H"), "down_proj": ("H", "N")}


def gated(name: str, width: str) -> Shapes:
    """A gated MLP."""
    return {
        f"{name}.gate_proj.weight": (width, "H"),
        f"{name}.up_proj.weight": (width, "H"),
        f"{name}.down_proj.weight": ("H", width),
    }


_QWEN_SHARED: Shapes = {**gated("mlp.shared_expert", "S"), "mlp.shared_expert_gate.weight": (1, "H")}
_GATE: Shapes = {"mlp.gate.weight": ("E", "H")}


@dataclass(frozen=True, kw_only=True)
class StockLayout:
    """One family's checkpoint.

    Args:
        architecture: `architectures` in `config.json`, which both engines choose their loader by.
        attention: Tensors of an attention layer.
        optional: Tensors that the config switches on or off.
        block: Tensors of the MoE block without experts.
        shared: Tensors of shared experts, where the config says that there are some.
        expert: Where the experts are, `{e}` for the number of one.
        matrices: Their matrices.
        moe_layers: Which decoder layers have experts.
        expert_count: Config field with the number of routed experts, as published.
        expert_width: Config field with the channels of one.
        top_k: Config field with the experts of a token.
        fields: Config fields that engines read and transformers' own config may lack, with what they must say.
        prediction_layers: The config may count layers for multi-token prediction, whose tensors no model here has.
    """

    architecture: str
    attention: Shapes = field(default_factory=lambda: _QUERIES)
    optional: Shapes = field(default_factory=dict)
    block: Shapes = field(default_factory=lambda: _GATE)
    shared: Shapes = field(default_factory=dict)
    expert: str = "mlp.experts.{e}."
    matrices: Shapes = field(default_factory=lambda: {f"{name}.weight": shape for name, shape in _PER_EXPERT.items()})
    moe_layers: Rule = "all"
    expert_count: str = "num_experts"
    expert_width: str = "moe_intermediate_size"
    top_k: str = "num_experts_per_tok"
    fields: Mapping[str, Any] = field(default_factory=dict)
    prediction_layers: bool = False


_SHARED: Shapes = gated("mlp.shared_experts", "S")
_BIASED_GATE: Shapes = {**_GATE, "mlp.gate.e_score_correction_bias": ("E",)}
LAYOUTS: Mapping[str, StockLayout] = {
    "qwen2_moe": StockLayout(
        architecture="Qwen2MoeForCausalLM", optional=_BIASES, shared=_QWEN_SHARED, moe_layers="sparse_step"
    ),
    "qwen3_moe": StockLayout(
        architecture="Qwen3MoeForCausalLM",
        attention={**_QUERIES, **_HEAD_NORMS},
        optional=_BIASES,
        moe_layers="sparse_step",
    ),
    "qwen3_next": StockLayout(
        architecture="Qwen3NextForCausalLM",
        attention=_GATED_QUERIES,
        optional=_BIASES,
        shared=_QWEN_SHARED,
        moe_layers="sparse_step",
    ),
    "mixtral": StockLayout(
        architecture="MixtralForCausalLM",
        expert_count="num_local_experts",
        expert_width="intermediate_size",
        block={"block_sparse_moe.gate.weight": ("E", "H")},
        expert="block_sparse_moe.experts.{e}.",
        matrices={"w1.weight": ("N", "H"), "w2.weight": ("H", "N"), "w3.weight": ("N", "H")},
    ),
    "olmoe": StockLayout(
        architecture="OlmoeForCausalLM",
        attention={**_QUERIES, **_ALL_NORMS},
        optional=_BIASES,
        expert_width="intermediate_size",
    ),
    "granitemoe": StockLayout(
        architecture="GraniteMoeForCausalLM",
        expert_count="num_local_experts",
        expert_width="intermediate_size",
        optional=_BIASES,
        block={"block_sparse_moe.router.layer.weight": ("E", "H")},
        expert="block_sparse_moe.",  # all of them in one tensor
        matrices={"input_linear.weight": ("E", "2N", "H"), "output_linear.weight": ("E", "H", "N")},
    ),
    "deepseek": StockLayout(
        architecture="DeepseekForCausalLM",
        expert_count="n_routed_experts",
        optional=_BIASES,
        shared=_SHARED,
        moe_layers="first_dense",
        fields={"norm_topk_prob": False, "scoring_func": "softmax", "moe_layer_freq": 1},
    ),
    "deepseek_v2": StockLayout(
        architecture="DeepseekV2ForCausalLM",
        expert_count="n_routed_experts",
        attention=_LATENT,
        shared=_SHARED,
        moe_layers="first_dense",
        fields={"scoring_func": "softmax", "moe_layer_freq": 1},
    ),
    "deepseek_v3": StockLayout(
        architecture="DeepseekV3ForCausalLM",
        expert_count="n_routed_experts",
        attention=_LATENT,
        block=_BIASED_GATE,
        shared=_SHARED,
        moe_layers="first_dense",
        fields={"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1},
        prediction_layers=True,
    ),
    "glm4_moe": StockLayout(
        architecture="Glm4MoeForCausalLM",
        expert_count="n_routed_experts",
        optional={**_BIASES, **_HEAD_NORMS},
        block=_BIASED_GATE,
        shared=_SHARED,
        moe_layers="first_dense",
        prediction_layers=True,
    ),
    "ernie4_5_moe": StockLayout(
        architecture="Ernie4_5_MoeForCausalLM",
        expert_count="moe_num_experts",
        top_k="moe_k",
        optional=_BIASES,
        block={**_GATE, "mlp.moe_statics.e_score_correction_bias": (1, "E")},
        shared=_SHARED,
        moe_layers="interval",
    ),
}
