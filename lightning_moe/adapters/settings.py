"""What the settings of a stored adapter may say: they are data, and PEFT would follow them to modules and memory."""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any

from lightning_moe.adapters.inject import MoeLoraConfig

# Names and module paths as this package writes them: escaped, `|` between them, some numbers in brackets.
_LONGEST_PATTERN, _MOST_REPEATS, _MOST_GROUPS = 100_000, 4, 4

# Where an adapter came from, and what only other kinds of it read: left aside.
_IGNORED = ("auto_mapping", "peft_version", "revision", "runtime_config", "megatron_core", "qalora_group_size")


def checked_settings(content: object, *, largest_rank: int, source: str) -> dict[str, Any]:
    """The settings of a LoRA or DoRA adapter out of a file, each of the kind that it must be.

    Args:
        content: what the file says.
        largest_rank: more than this a rank cannot be.
        source: named in messages.

    Raises:
        ValueError: it is no adapter of this kind, a setting is of another kind than it must be, or it asks for more
            than this package reads (other initialisations, replicated layers, Megatron's modules); the message names
            the field.
    """
    if not isinstance(content, Mapping) or content.get("peft_type") != "LORA" or "target_modules" not in content:
        raise ValueError(f"'{source}' is not the config of a LoRA or DoRA adapter.")

    def is_rank(value: object) -> bool:
        return type(value) is int and 1 <= value <= largest_rank

    kinds = _kinds(is_rank)
    values: dict[str, Any] = {}
    for field in fields(MoeLoraConfig):
        value = content.get(field.name)
        if not field.init or value is None or field.name in _IGNORED:
            continue
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        if field.name not in kinds:
            if value != default and value not in ({}, [], False):
                raise ValueError(f"'{source}': `{field.name}` is {value!r:.60}, which this package does not read.")
        elif not kinds[field.name](value):
            raise ValueError(
                f"'{source}': `{field.name}` is {value!r:.60}, which is no value of it (ranks are 1 to {largest_rank})."
            )
        else:
            values[field.name] = value
    return values


def _kinds(is_rank: Callable[[object], bool]) -> dict[str, Callable[[Any], bool]]:
    return {
        "task_type": _is_text,
        "peft_type": _is_text,
        "base_model_name_or_path": _is_text,
        "inference_mode": _is_flag,
        "r": is_rank,
        "target_modules": lambda value: _is_pattern(value) or _is_names(value),
        "exclude_modules": lambda value: _is_pattern(value) or _is_names(value),
        "lora_alpha": _is_scale,
        "lora_dropout": lambda value: _is_number(value) and 0 <= value < 1,
        "fan_in_fan_out": _is_flag,
        "bias": lambda value: value == "none",
        "use_rslora": _is_flag,
        "use_dora": _is_flag,
        "modules_to_save": _is_names,
        "init_lora_weights": _is_flag,
        "layers_to_transform": lambda value: (
            type(value) is int or (_is_list(value) and all(type(n) is int for n in value))
        ),
        "layers_pattern": lambda value: _is_names([value] if isinstance(value, str) else value),
        "rank_pattern": lambda value: _is_table(value) and all(map(is_rank, value.values())),
        "alpha_pattern": lambda value: _is_table(value) and all(map(_is_scale, value.values())),
        "target_parameters": lambda value: value == [],
    }


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def _is_scale(value: Any) -> bool:
    return _is_number(value) and 0 < value < 2**31


def _is_list(value: object) -> bool:
    return isinstance(value, list | tuple | set)


def _is_names(value: Any) -> bool:
    return _is_list(value) and all(isinstance(name, str) and name for name in value)


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping) and all(map(_is_pattern, value))


def _is_pattern(value: object) -> bool:
    """A regular expression that is matched in no time: few repeats, none of a group, few groups side by side."""
    if not isinstance(value, str) or len(value) > _LONGEST_PATTERN or any(letter in value for letter in "{[\n"):
        return False
    repeats = sum(value.count(sign) - value.count(f"\\{sign}") for sign in "*+?")
    if repeats > _MOST_REPEATS or any(f"){sign}" in value for sign in "*+?") or "(?" in value:
        return False
    depth = groups = 0
    for letter in value:
        depth += (letter == "(") - (letter == ")")
        groups = 0 if letter == "|" and depth == 0 else groups + (letter == "(")
        if not 0 <= depth <= 1 or groups > _MOST_GROUPS:
            return False
    return depth == 0
