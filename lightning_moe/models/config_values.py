"""Which values of `config.json` a model of a known family can have, looked at before a model is made of them.

transformers takes most numbers as they come: with `rms_norm_eps: NaN` a model loads, and answers with NaN.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.activations import ACT2FN

from lightning_moe.models.config_text import LARGEST_LAYERS
from lightning_moe.models.families import Family, family_of
from lightning_moe.models.sources import find_file

ANEW = "Write or download it again."

_CHOSEN, _UNGROUPED, _GROUPED = "num_experts_per_tok", "greedy", "group_limited_greedy"
# More than any model has, and few enough that a config alone cannot take much memory: names, widths, layers.
_LARGEST_COUNT, _LARGEST_EXPERTS = 2**31 - 1, 2**16
# Fields that count something there is at least one of; those below may be null, where the family does without.
_COUNTS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "moe_intermediate_size",
    "max_position_embeddings",
    "decoder_sparse_step",
    "moe_layer_interval",
)
_OPTIONAL_COUNTS = (
    "head_dim",
    "qk_rope_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "n_group",
    "topk_group",
    "sliding_window",
)
# Heads of keys and of the queries (or values) that share them equally.
_SHARED_HEADS = {"num_key_value_heads": "num_attention_heads", "linear_num_key_heads": "linear_num_value_heads"}


@dataclass(frozen=True, kw_only=True)
class _Range:
    """Numbers from `least` to `most`; `above` and `below` leave out the end itself."""

    least: float = 0
    most: float = 1e6
    above: bool = False
    below: bool = False

    def holds(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        low = self.least < value if self.above else self.least <= value
        return low and (value < self.most if self.below else value <= self.most)

    def __str__(self) -> str:
        low, high = "above" if self.above else "of at least", "below" if self.below else "at most"
        return f"{low} {self.least:g} and {high} {self.most:g}"


_SHARE, _FACTOR, _WEIGHT = _Range(most=1, below=True), _Range(above=True), _Range()
# Wherever they stand in the config: `rope_theta` and `factor` are in `rope_parameters`. Null is left to transformers.
_RANGES = {
    "rms_norm_eps": _SHARE,
    "moe_norm_min": _SHARE,
    "attention_dropout": _SHARE,
    "router_jitter_noise": _SHARE,
    "partial_rotary_factor": _Range(most=1, above=True),
    "rope_theta": _Range(least=1, most=1e15),
    "factor": _FACTOR,
    "clip_qkv": _FACTOR,
    "routed_scaling_factor": _FACTOR,
    "embedding_multiplier": _FACTOR,
    "attention_multiplier": _FACTOR,
    "residual_multiplier": _FACTOR,
    "logits_scaling": _FACTOR,
    "initializer_range": _WEIGHT,
    "router_aux_loss_coef": _WEIGHT,
    "aux_loss_alpha": _WEIGHT,
}
_MAY_BE_INFINITE = ("time_step_limit",)  # of Mamba layers, where it says that there is no limit


def check_values(config: PretrainedConfig, *, source: str) -> None:
    """Refuses a config of an unknown family, or with values that no model of it can have.

    Args:
        config: as transformers reads it.
        source: folder, asset, hub name or file that it is of.

    Raises:
        ValueError: see above; the message names the file and the field.
    """
    text = config.get_text_config()
    family = family_of(text)
    for name, kernel in implementations(text).items():
        if kernel is not None and not str(kernel).isidentifier():  # `owner/name` is compiled code on the hub
            raise ValueError(
                f"{unusable(source)}: `{name}_implementation` must be one of transformers' own, such as 'sdpa', got "
                f"{kernel!r:.60}. Remove it: a checkpoint does not choose the code that runs it."
            )
    for field, allowed, value in _problems(config, text=text, family=family):
        raise ValueError(f"{unusable(source)}: `{field}` must be {allowed}, got {value!r:.40}. {ANEW}")


def implementations(config: PretrainedConfig) -> dict[str, str | None]:
    """Which code of transformers runs attention (`attn`) and `experts`; None: it has not been chosen yet."""
    return {"attn": config._attn_implementation, "experts": config._experts_implementation}


def unusable(source: str) -> str:
    """The beginning of a message on a value of a source's config."""
    path = source if source.endswith(".json") else find_file(source, "config.json")
    return f"'{path}' holds a value that the model cannot be made with"


_Problem = tuple[str, str, object]


def _problems(config: PretrainedConfig, *, text: PretrainedConfig, family: Family) -> Iterator[_Problem]:
    """Field, what it must be, and what it is, of each one that does not fit; each check relies on those before it."""
    values = text.to_dict() | {family.expert_count: getattr(text, family.expert_count)}  # another field's other name
    yield from _wrong_counts(values, family=family)
    yield from _wrong_numbers(config.to_dict(), within="config.json")
    yield from _wrong_heads(values)
    yield from _wrong_routing(values, family=family, chosen=text.attribute_map.get(_CHOSEN, _CHOSEN))
    if not isinstance(config.dtype, torch.dtype | None):
        yield "dtype", "a type of PyTorch, such as 'bfloat16'", config.dtype
    activation = values.get("hidden_act", "silu")
    if not isinstance(activation, str) or activation not in ACT2FN:
        yield "hidden_act", "an activation that transformers knows, such as 'silu'", activation


def _wrong_counts(values: dict[str, Any], *, family: Family) -> Iterator[_Problem]:
    largest = {"num_hidden_layers": LARGEST_LAYERS, family.expert_count: _LARGEST_EXPERTS}
    given = [name for name in _OPTIONAL_COUNTS if values.get(name) is not None]
    if not values.get("use_sliding_window", True) and "sliding_window" in given:
        given.remove("sliding_window")  # 0 there
    for name in (*_COUNTS, family.expert_count, *given):
        value, most = values.get(name, 1), largest.get(name, _LARGEST_COUNT)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            yield name, f"an integer above 0 and at most {most}", value


def _wrong_numbers(content: Any, *, within: str) -> Iterator[_Problem]:
    """Numbers that are none or out of their range, at any depth; `within` is the field that holds the content."""
    if isinstance(content, dict):
        for name, value in content.items():
            allowed = _RANGES.get(name)
            if allowed is not None and value is not None and not allowed.holds(value):
                yield name, f"a number {allowed}", value
            yield from _wrong_numbers(value, within=str(name))
    elif isinstance(content, list | tuple):
        for value in content:
            yield from _wrong_numbers(value, within=within)
    elif content == math.inf and within in _MAY_BE_INFINITE:
        return
    elif isinstance(content, float) and not math.isfinite(content):
        yield repr(within)[1:-1], "finite", content  # a name from the file, on one line


def _wrong_heads(values: dict[str, Any]) -> Iterator[_Problem]:
    for shared, all_heads in _SHARED_HEADS.items():
        if (values.get(all_heads) or 0) % (values.get(shared) or 1):
            yield shared, f"a divisor of `{all_heads}`, {values[all_heads]}", values[shared]
    for name in ("head_dim", "qk_rope_head_dim"):
        if (values.get(name) or 0) % 2:
            yield name, "even: positions turn pairs of channels", values[name]


def _wrong_routing(values: dict[str, Any], *, family: Family, chosen: str) -> Iterator[_Problem]:
    """Of a token's experts: how many, of how many groups, and how these are chosen."""
    num_experts, groups = values[family.expert_count], values.get("n_group") or 1
    taken, most = values.get(chosen, 1), num_experts
    if not isinstance(values.get("norm_topk_prob", False), bool):
        yield "norm_topk_prob", "true or false", values["norm_topk_prob"]
    method = values.get("topk_method") if family.router_groups == "best" else _GROUPED
    if method not in (_UNGROUPED, _GROUPED):
        yield "topk_method", f"{_UNGROUPED} or {_GROUPED}", method
    if family.router_groups != "none" and method == _GROUPED:
        if num_experts % groups:
            yield "n_group", f"a divisor of `{family.expert_count}`, {num_experts}", groups
        of_groups = values.get("topk_group") or groups
        if of_groups > groups:
            yield "topk_group", f"between 1 and the {groups} groups of experts", of_groups
        most = num_experts // groups * of_groups
    if not isinstance(taken, int) or not 1 <= taken <= most:
        yield chosen, f"between 1 and the {most} experts", taken
