"""Tiny random models of every supported family: hidden 64, 8 experts of 32 channels, vocabulary 128."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import lightning_moe.models.deepseek  # noqa: F401  (registers the model type)
from lightning_moe.models.discovery import moe_layers
from lightning_moe.models.routers import row_tensor, without_adapter

VOCAB_SIZE = 128
HIDDEN_SIZE = 64
NUM_EXPERTS = 8
WIDTH = 32
TOP_K = 2

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": TOP_K,
    "max_position_embeddings": 256,
    "initializer_range": 0.05,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_QWEN: dict[str, Any] = {"moe_intermediate_size": WIDTH, "num_experts": NUM_EXPERTS, "head_dim": 16}
_SPARSE: dict[str, Any] = {"decoder_sparse_step": 1, "mlp_only_layers": []}
_SHARED: dict[str, Any] = {"shared_expert_intermediate_size": 24, "norm_topk_prob": False}
_MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
# One dense layer first, then two MoE layers.
_DEEPSEEK: dict[str, Any] = {
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": WIDTH,
    "n_routed_experts": NUM_EXPERTS,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
}
_GREEDY: dict[str, Any] = {"topk_method": "greedy", "norm_topk_prob": False}
_GROUPED: dict[str, Any] = {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}

_CONFIGS: Mapping[str, dict[str, Any]] = {
    "qwen2_moe": _QWEN | _SPARSE | _SHARED,
    "qwen3_moe": _QWEN | _SPARSE | {"norm_topk_prob": True},
    "qwen3_next": _QWEN
    | _SPARSE
    | _SHARED
    | {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "norm_topk_prob": True,
    },
    "mixtral": {"intermediate_size": WIDTH, "num_local_experts": NUM_EXPERTS, "sliding_window": None},
    "olmoe": {"intermediate_size": WIDTH, "num_experts": NUM_EXPERTS, "norm_topk_prob": False},
    "granitemoe": {
        "intermediate_size": WIDTH,
        "num_local_experts": NUM_EXPERTS,
        "residual_multiplier": 0.22,
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.0625,
        "logits_scaling": 6.0,
    },
    "deepseek": _DEEPSEEK | {"num_experts": NUM_EXPERTS, "topk_method": "greedy", "routed_scaling_factor": 1.0},
    "deepseek_v2": _DEEPSEEK | _MLA | _GREEDY | {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "deepseek_v3": _DEEPSEEK | _MLA | {"norm_topk_prob": True},
    "glm4_moe": _DEEPSEEK | {"head_dim": 16, "norm_topk_prob": True},
    "ernie4_5_moe": {
        "moe_intermediate_size": WIDTH,
        "moe_num_experts": NUM_EXPERTS,
        "moe_num_shared_experts": 1,
        "moe_k": TOP_K,
        "num_hidden_layers": 3,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 2,
        "moe_layer_interval": 1,
    },
}

# Name of a model -> family and what differs from the family's own config.
_VARIANTS: Mapping[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in _CONFIGS} | {
    "qwen2_moe_normalised": ("qwen2_moe", {"norm_topk_prob": True}),
    "deepseek_v2_grouped": ("deepseek_v2", _GROUPED | {"topk_method": "group_limited_greedy"}),
    "deepseek_v3_grouped": ("deepseek_v3", _GROUPED),
    "glm4_moe_grouped": ("glm4_moe", _GROUPED),
}

FAMILY_NAMES = tuple(_CONFIGS)
MODEL_NAMES = tuple(_VARIANTS)


def tiny_model(
    name: str = "qwen3_moe", *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedModel:
    """A model in eval mode; `name` is one of MODEL_NAMES, `overrides` are fields of its config.

    Routers have weights of visible spread and, where the family has them, non-zero correction biases.
    """
    family, differences = _VARIANTS[name]
    config = CONFIG_MAPPING[family](**(_COMMON | _CONFIGS[family] | differences | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        _spread_routers(model)
    if dtype == torch.float64:
        model.set_experts_implementation("eager")  # grouped_mm refuses float64
    return model.eval()


def _spread_routers(model: PreTrainedModel) -> None:
    for layer in moe_layers(model):
        router = without_adapter(layer.router)
        weight = row_tensor(router, "weight")
        weight.data.normal_(std=1.0 / weight.shape[-1] ** 0.5)
        if layer.family.selection_bias is not None:
            row_tensor(router, layer.family.selection_bias).data.normal_(std=0.05)


def random_tokens(*, batch: int = 2, length: int = 16, seed: int = 0) -> Tensor:
    """Token ids `[batch, length]`, none of them padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (batch, length), generator=generator)
