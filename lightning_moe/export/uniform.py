"""Stock checkpoints that are really smaller: experts of one width, or fewer experts, the same in every layer."""

import copy
from collections import Counter
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_moe.export.padded import WIDTH_MULTIPLE, check_novices, kept_experts
from lightning_moe.export.place import NotReproducedError
from lightning_moe.files import read_shapes
from lightning_moe.models.discovery import MoeLayer, expert_widths, moe_layers

SmallerFormat = Literal["uniform", "expert_dropped"]


def check_smaller(model: PreTrainedModel, *, format: SmallerFormat) -> tuple[str, ...]:
    """Refuses a model that no stock checkpoint holds without padding its routed experts.

    Args:
        model: The cut model.
        format: `uniform` (one width) or `expert_dropped` (all channels of the experts that are left).

    Returns:
        What of it is padded all the same, in words: shared experts whose width the config derives from the experts'.

    Raises:
        ValueError: experts of several widths or counts, nothing that was cut, or a width that transformers pads.
    """
    layers = moe_layers(model)
    check_novices(layers)
    kept = zip(layers, kept_experts(layers), strict=True)
    widths = [[expert_widths(layer.experts)[expert] for expert in own] for layer, own in kept]
    dense_count, dense_width = _declared(model, layers)
    _check_counts(widths, format=format, dense=dense_count)
    width = _one_width(widths, format=format, dense=dense_width)
    if format == "expert_dropped" and len(widths[0]) == dense_count:
        raise ValueError(
            f"Export format 'expert_dropped' is for a model that lost whole experts, and all {dense_count} of each "
            "layer are here. Use `uniform` where channels went, `stock` where nothing did."
        )
    if width == dense_width and len(widths[0]) == dense_count:
        raise ValueError(
            f"Export format 'uniform' is for a cut model, and this one has all {dense_count} experts of "
            f"{dense_width} channels. Use `stock`, or prune it with a plan of `--method uniform`."
        )
    return _padded_shared(model, layers, width=width)


def is_cut(model: PreTrainedModel) -> bool:
    """Whether experts or channels are gone from what the config declares, whoever took them."""
    layers = moe_layers(model)
    count, width = _declared(model, layers)
    return any(list(expert_widths(layer.base_experts)) != [width] * count for layer in layers)


def _declared(model: PreTrainedModel, layers: Sequence[MoeLayer]) -> tuple[int, int]:
    """Experts of a layer and channels of an expert before any cut."""
    config, family = model.config.get_text_config(), layers[0].family
    return int(getattr(config, family.expert_count)), int(getattr(config, family.expert_width))


def _check_counts(widths: list[list[int]], *, format: SmallerFormat, dense: int) -> None:
    counts = [sum(width > 0 for width in own) for own in widths]
    if len(set(counts)) > 1 or any(0 in own for own in widths):
        raise ValueError(
            f"Export format '{format}' needs one number of experts in every layer (and in every group of a grouped "
            f"router), and the layers keep {min(counts)} to {max(counts)} of {dense}: {_spread(counts)}. Plan one "
            "width (`plan --method uniform`), drop equally many in each layer, or export `ragged`."
        )


def _one_width(widths: list[list[int]], *, format: SmallerFormat, dense: int) -> int:
    """The width of every expert.

    Raises:
        ValueError: there are several, or it is not the one that the format is about.
    """
    found = sorted({width for own in widths for width in own})
    if format == "expert_dropped" and found != [dense]:
        raise ValueError(
            f"Export format 'expert_dropped' keeps all {dense} channels of the experts that are left, and here they "
            f"have {found[0]} to {found[-1]}. Use `uniform` where all have one width, `padded` or `ragged` otherwise."
        )
    if len(found) > 1:
        counted = _spread([width for own in widths for width in own])
        raise ValueError(
            f"Export format 'uniform' needs one width for every expert, and this model has {len(found)} widths from "
            f"{found[0]} to {found[-1]} channels: {counted}. Plan one width (`python -m lightning_moe plan --method "
            "uniform`) and prune with that, or export `padded`, which adds zero channels and saves nothing."
        )
    if found[0] % WIDTH_MULTIPLE:
        raise ValueError(
            f"Export format 'uniform' adds no zero channels, and transformers' grouped products want widths that are "
            f"multiples of {WIDTH_MULTIPLE}, got {found[0]}. Plan with `--method uniform --method_args '{{align: "
            f"{WIDTH_MULTIPLE}}}'`, or export `padded`."
        )
    return found[0]


def _spread(values: Sequence[int]) -> str:
    """The most common values and how often they come."""
    common = Counter(values).most_common(4)
    told = ", ".join(f"{value} ({count}x)" for value, count in common)
    return told + (", ..." if len(set(values)) > len(common) else "")


def _padded_shared(model: PreTrainedModel, layers: Sequence[MoeLayer], *, width: int) -> tuple[str, ...]:
    family, config = layers[0].family, model.config.get_text_config()
    if family.shared_count is None:
        return ()
    shared = int(getattr(config, family.shared_count)) * int(getattr(config, family.expert_width))
    added = -shared % width
    if not added:
        return ()
    return (
        f"the config gives shared experts a multiple of the routed experts' width: each has {added} zero channels "
        f"beside its {shared}",
    )


def check_bytes(folder: str | Path, *, model: PreTrainedModel) -> None:
    """The tensors of the files are fewer bytes than those of the dense model in the same type.

    Args:
        folder: The export.
        model: The cut model, whose config still declares the dense one.

    Raises:
        NotReproducedError: they are not.
    """
    files, element = sorted(Path(folder).glob("*.safetensors")), model.dtype.itemsize
    stored = element * sum(prod(shape) for file in files for shape in read_shapes(file, what="weights").values())
    config = copy.deepcopy(model.config)
    vars(config).pop("quantization_config", None)
    with torch.device("meta"):
        dense_model = AutoModelForCausalLM.from_config(config)
    tied = dense_model.all_tied_weights_keys
    dense = element * sum(value.numel() for name, value in dense_model.state_dict().items() if name not in tied)
    if stored >= dense:
        raise NotReproducedError(
            f"The export '{folder}' is not smaller than the dense model: {stored:,} bytes of tensors against "
            f"{dense:,}. Shared experts may be padded: choose a width that divides theirs."
        )
