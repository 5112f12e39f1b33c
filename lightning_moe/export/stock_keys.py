"""Whether an exported stock checkpoint is what vLLM's loader and llama.cpp's converter look for, by name and shape."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from lightning_moe.export.engine_limits import ENGINES, engine_limits
from lightning_moe.export.place import NotReproducedError
from lightning_moe.export.stock_config import older_fields
from lightning_moe.export.stock_layouts import (
    LAYOUTS,
    LINEAR_ATTENTION,
    LOW_RANK_QUERIES,
    PLAIN_QUERIES,
    Shapes,
    StockLayout,
    gated,
)
from lightning_moe.files import read_json, read_shapes
from lightning_moe.models.families import family_of

_PREDICTION_LAYERS = "num_nextn_predict_layers"


def layout_of(config: PretrainedConfig) -> StockLayout:
    """How a family's stock checkpoint looks.

    Raises:
        ValueError: nobody wrote that down for this model type.
    """
    if config.model_type not in LAYOUTS:
        raise ValueError(
            f"The stock checkpoint of model type '{config.model_type}' is not described in "
            f"`lightning_moe/export/stock_layouts.py` (known: {', '.join(sorted(LAYOUTS))}). Export `ragged` or `nf4`, "
            "or describe it there."
        )
    return LAYOUTS[config.model_type]


def set_engine_fields(config: PretrainedConfig) -> None:
    """Gives a config the fields that engines read and transformers does without, in place.

    A count of multi-token prediction layers becomes 0: their tensors are not part of the model, and llama.cpp's
    converter would wait for them.
    """
    layout = layout_of(config)
    for name, value in layout.fields.items():
        if vars(config).get(name) is None:
            setattr(config, name, value)
    if layout.prediction_layers:
        setattr(config, _PREDICTION_LAYERS, 0)


def check_stock_keys(folder: str | Path, *, config: PretrainedConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Compares the tensors and the config of a stock export with what engines expect of its family.

    Args:
        folder: The export.
        config: Its config.

    Returns:
        The engines whose expectations were checked and met, and a sentence about each other one.

    Raises:
        NotReproducedError: names the first tensor that is missing, unknown or of another shape, or the first config
            field that says something else.
    """
    layout = layout_of(config)
    _check_fields(read_json(Path(folder) / "config.json", what="model config"), config=config, folder=folder)
    found: dict[str, tuple[int, ...]] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        found |= read_shapes(file, what="file of weights")
    required, optional = expected_shapes(config)
    for name in sorted(required.keys() | found.keys()):
        wanted = (required | optional).get(name)
        if found.get(name) == wanted:
            continue
        came = "is missing" if name not in found else f"has shape {found[name]}"
        allowed = "none of that name is known" if wanted is None else f"{wanted} is expected"
        raise NotReproducedError(
            f"The export '{folder}' is not what {' and '.join(ENGINES)} load as {layout.architecture}: '{name}' "
            f"{came}, {allowed}. It is left there for inspection; do not ship it."
        )
    limits = engine_limits(config, tensors=found, sizes=sizes_of(config))
    told = tuple(f"not for {engine}: {reason}" for engine, reasons in limits.items() for reason in reasons)
    return tuple(engine for engine in ENGINES if engine not in limits), told


def _check_fields(content: Mapping[str, Any], *, config: PretrainedConfig, folder: str | Path) -> None:
    layout, sizes = layout_of(config), sizes_of(config)
    wanted: dict[str, Any] = {
        "architectures": [layout.architecture],
        layout.expert_count: sizes["E"],
        layout.expert_width: sizes["N"],
        layout.top_k: config.num_experts_per_tok,
        **older_fields(config.to_dict()),
        "torch_dtype": content.get("dtype"),
        **layout.fields,
    }
    if layout.prediction_layers:
        wanted[_PREDICTION_LAYERS] = 0
    for name, value in wanted.items():
        if content.get(name) != value:
            raise NotReproducedError(
                f"The export '{folder}' is not what {' and '.join(ENGINES)} load as {layout.architecture}: `{name}` in "
                f"config.json is {content.get(name)!r}, expected {value!r}. It is left there for inspection; do "
                "not ship it."
            )


def expected_shapes(config: PretrainedConfig) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Shapes by published name: of tensors that must be there, and of those that may."""
    layout, sizes = layout_of(config), sizes_of(config)
    required: dict[str, tuple[str | int, ...]] = {"model.embed_tokens.weight": ("V", "H"), "model.norm.weight": ("H",)}
    optional: dict[str, tuple[str | int, ...]] = {}
    if not config.tie_word_embeddings:
        required["lm_head.weight"] = ("V", "H")
    for index in range(config.num_hidden_layers):
        parts: dict[str, tuple[str | int, ...]] = {
            "input_layernorm.weight": ("H",),
            "post_attention_layernorm.weight": ("H",),
            **_attention(config, layout=layout, index=index),
            **(_experts(layout, sizes=sizes) if _has_experts(config, layout, index) else gated("mlp", "I")),
        }
        required |= {f"model.layers.{index}.{name}": shape for name, shape in parts.items()}
        optional |= {f"model.layers.{index}.{name}": shape for name, shape in layout.optional.items()}
    return _numbers(required, sizes=sizes), _numbers(optional, sizes=sizes)


def _attention(config: PretrainedConfig, *, layout: StockLayout, index: int) -> Shapes:
    if config.model_type == "qwen3_next" and config.layer_types[index] == "linear_attention":
        return LINEAR_ATTENTION
    if config.model_type in ("deepseek_v2", "deepseek_v3"):
        return {**layout.attention, **(PLAIN_QUERIES if config.q_lora_rank is None else LOW_RANK_QUERIES)}
    return layout.attention


def _experts(layout: StockLayout, *, sizes: Mapping[str, int]) -> Shapes:
    """The MoE block: each expert on its own, or all in one tensor where the name has no number."""
    one_by_one = "{e}" in layout.expert
    places = [layout.expert.format(e=expert) for expert in range(sizes["E"])] if one_by_one else [layout.expert]
    routed = {f"{place}{name}": shape for place in places for name, shape in layout.matrices.items()}
    return {**layout.block, **routed, **(layout.shared if sizes["S"] else {})}


def _has_experts(config: PretrainedConfig, layout: StockLayout, index: int) -> bool:
    """The engines' own rule for a decoder layer."""
    match layout.moe_layers:
        case "all":
            return True
        case "sparse_step":
            return index not in config.mlp_only_layers and (index + 1) % config.decoder_sparse_step == 0
        case "first_dense":
            return index >= config.first_k_dense_replace
        case "interval":
            inside = config.moe_layer_start_index <= index <= config.moe_layer_end_index
            return inside and (index + 1) % config.moe_layer_interval == 0


def sizes_of(config: PretrainedConfig) -> dict[str, int]:
    """What the letters and words of shapes are for this config."""
    family = family_of(config)
    width = int(getattr(config, family.expert_width))
    head = int(vars(config).get("head_dim") or config.hidden_size // config.num_attention_heads)
    shared = int(getattr(config, family.shared_count)) * width if family.shared_count else 0
    sizes = {
        "V": config.vocab_size,
        "H": config.hidden_size,
        "D": head,
        "Q": config.num_attention_heads * head,
        "K": config.num_key_value_heads * head,
        "E": int(getattr(config, family.expert_count)),
        "N": width,
        "S": shared or int(vars(config).get("shared_expert_intermediate_size") or 0),
        "I": config.intermediate_size,
    }
    sizes |= {"2Q": 2 * sizes["Q"], "2N": 2 * width}
    if config.model_type in ("deepseek_v2", "deepseek_v3"):
        sizes |= _latent_sizes(config)
    return sizes | (_linear_sizes(config) if config.model_type == "qwen3_next" else {})


def _latent_sizes(config: PretrainedConfig) -> dict[str, int]:
    heads, rope, plain = config.num_attention_heads, config.qk_rope_head_dim, config.qk_nope_head_dim
    return {
        "latent": config.kv_lora_rank,
        "latent+rope": config.kv_lora_rank + rope,
        "latent_kv": heads * (plain + config.v_head_dim),
        "latent_v": heads * config.v_head_dim,
        "latent_q": heads * (plain + rope),
        "q_rank": config.q_lora_rank or 0,
    }


def _linear_sizes(config: PretrainedConfig) -> dict[str, int]:
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim
    return {
        "linear_heads": config.linear_num_value_heads,
        "2linear_heads": 2 * config.linear_num_value_heads,
        "linear_head": config.linear_value_head_dim,
        "linear_v": values,
        "linear_qkv": 2 * keys + values,
        "linear_qkvz": 2 * (keys + values),
        "kernel": config.linear_conv_kernel_dim,
    }


def _numbers(shapes: Shapes, *, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(size if isinstance(size, int) else sizes[size] for size in shape) for name, shape in shapes.items()
    }
