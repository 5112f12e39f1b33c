"""Stock checkpoints that transformers loads and an engine does not run as they are, and why: written down by hand."""

from collections.abc import Collection, Mapping

from transformers import PretrainedConfig

ENGINES = ("vLLM", "llama.cpp")
_QKV = frozenset({"q_proj", "k_proj", "v_proj"})
_ALL = _QKV | {"o_proj"}
# Attention biases that an engine reads, by family; of families that are not named, none.
_READ: Mapping[str, Mapping[str, frozenset[str]]] = {
    "vLLM": dict.fromkeys(("qwen2_moe", "qwen3_moe", "glm4_moe", "ernie4_5_moe"), _QKV),
    "llama.cpp": {"qwen2_moe": _QKV, "glm4_moe": _QKV, "granitemoe": _ALL, "ernie4_5_moe": _ALL},
}


def engine_limits(
    config: PretrainedConfig, *, tensors: Collection[str], sizes: Mapping[str, int]
) -> Mapping[str, tuple[str, ...]]:
    """Reasons by engine; nothing of an engine that runs the checkpoint.

    Args:
        config: Of the checkpoint.
        tensors: Names of its tensors.
        sizes: `stock_keys.sizes_of` of the config.
    """
    owners = {name.split(".")[-2] for name in tensors if name.endswith("_proj.bias") and ".self_attn." in name}
    found: dict[str, tuple[str, ...]] = {}
    for engine in ENGINES:
        unread = sorted(owners - _READ[engine].get(config.model_type, frozenset()))
        said = (f"it does not read the biases of {', '.join(unread)}",) if unread else ()
        said += _of_converter(config, biased=bool(owners), sizes=sizes) if engine == "llama.cpp" else ()
        if said:
            found[engine] = said
    return found


def _of_converter(config: PretrainedConfig, *, biased: bool, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """What llama.cpp takes for granted of a family."""
    match config.model_type:
        case "qwen2_moe" if not biased:
            return ("it wants the biases of q_proj, k_proj and v_proj, and `qkv_bias` is false",)
        case "ernie4_5_moe" if sizes["S"] and sizes["S"] != config.intermediate_size // config.num_key_value_heads:
            derived = config.intermediate_size // config.num_key_value_heads
            return (
                f"it derives {derived} channels of the shared experts (`intermediate_size` by `num_key_value_heads`), "
                f"and they have {sizes['S']}",
            )
        case "deepseek_v2" if config.norm_topk_prob:
            return (
                "it does not normalise the weights of the chosen experts in this family, and `norm_topk_prob` is true",
            )
    return ()
