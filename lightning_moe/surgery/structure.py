"""The structure of a model: how it differs from what its source gives. Read off a model, kept in checkpoints, applied.

C channels of a layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from bitsandbytes.nn.modules import Linear4bit
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from lightning_moe.adapters.storage import adapter_settings, add_adapter
from lightning_moe.models.channel_experts import ChannelExperts, Origin
from lightning_moe.models.conversion import to_channel_experts
from lightning_moe.models.discovery import MoeLayer, expert_widths, moe_layers
from lightning_moe.models.saving import save_with_widths
from lightning_moe.quantization.linears import pack_linear
from lightning_moe.quantization.nf4 import pack_experts
from lightning_moe.records.masks import mask_from_hex, mask_to_hex
from lightning_moe.surgery.cut import cut_layer

_VERSION = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerStructure:
    """One MoE layer.

    Args:
        name: full name of the experts module.
        origin: which of the source's channels are left; None for stock experts, as the source gives them.
        packed: whether the experts are in 4 bit.

    Raises:
        ValueError: a value of the wrong kind.
    """

    name: str
    origin: Origin | None
    packed: bool

    def __post_init__(self) -> None:
        _checked_name(self.name)
        if not isinstance(self.packed, bool) or (self.packed and self.origin is None):
            raise ValueError(f"{self.name}: `packed` must be true or false, and false for stock experts.")

    def to_dict(self) -> dict[str, Any]:
        """Plain types; the kept channels are one hexadecimal mask, first channel in the highest bit."""
        content: dict[str, Any] = {"name": self.name, "packed": self.packed, "origin": None}
        if self.origin is not None:
            kept = mask_to_hex(self.origin.kept_C)
            origin = {"widths": list(self.origin.widths), "kept": kept, "refitted": self.origin.refitted}
            content["origin"] = origin
        return content

    @classmethod
    def from_dict(cls, content: object) -> Self:
        """The inverse of `to_dict`.

        Raises:
            ValueError: keys or values do not fit.
        """
        values = _checked(content, keys={field.name for field in fields(cls)}, what="A layer's structure")
        name = _checked_name(values["name"])
        if values["origin"] is not None:
            keys = {"widths", "kept", "refitted"}
            origin = _checked(values["origin"], keys=keys, what=f"The origin of {name}")
            if not isinstance(origin["widths"], list):
                raise ValueError(f"{name}: `widths` must be a list of counts, got {origin['widths']!r}.")
            widths = tuple(origin["widths"])
            num_channels = sum(width for width in widths if isinstance(width, int))
            what = f"{name}: `kept`: the mask of the kept channels"
            kept_C = mask_from_hex(origin["kept"], num_channels=num_channels, what=what)
            values["origin"] = Origin(widths=widths, kept_C=kept_C, refitted=origin["refitted"])
        return cls(**values)


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelStructure:
    """What was done to a model since it was loaded: cuts, packing, adapters.

    Args:
        hidden_size: H of the model.
        layers: its MoE layers, first layer first.
        linears: full names of the Linear layers that are in 4 bit.
        adapter: PEFT's settings of the adapter, plain types, with the ranks that it really has; None without one.

    Raises:
        ValueError: no layers, a name twice, or a value of the wrong kind.
    """

    hidden_size: int
    layers: tuple[LayerStructure, ...]
    linears: tuple[str, ...]
    adapter: Mapping[str, Any] | None

    def __post_init__(self) -> None:
        if isinstance(self.hidden_size, bool) or not isinstance(self.hidden_size, int) or self.hidden_size < 1:
            raise ValueError(f"`hidden_size` must be a count >= 1, got {self.hidden_size!r}.")
        names = [layer.name for layer in self.layers]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"`layers` must be at least one layer, with different names, got {names}.")
        if not all(isinstance(name, str) for name in self.linears):
            raise ValueError(f"`linears` must be names of Linear layers, got {self.linears!r}.")
        if self.adapter is not None and not isinstance(self.adapter, Mapping):
            raise ValueError(f"`adapter` must be PEFT's settings by name, or null, got {self.adapter!r}.")

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for checkpoints and JSON; a bit per channel."""
        content: dict[str, Any] = {"version": _VERSION, "hidden_size": self.hidden_size}
        content |= {"layers": [layer.to_dict() for layer in self.layers], "linears": list(self.linears)}
        return content | {"adapter": None if self.adapter is None else dict(self.adapter)}

    @classmethod
    def from_dict(cls, content: object) -> Self:
        """The inverse of `to_dict`.

        Raises:
            ValueError: keys or values do not fit, or another version of lightning_moe wrote it.
        """
        keys = {"version"} | {field.name for field in fields(cls)}
        values = _checked(content, keys=keys, what="The structure of a model")
        version = values.pop("version")
        if version != _VERSION:
            raise ValueError(
                f"The structure is of `version` {version!r:.60}, this lightning_moe reads {_VERSION}. Use the version "
                "that wrote it."
            )
        for name in ("layers", "linears"):
            if not isinstance(values[name], list):
                raise ValueError(f"`{name}` of a model must be a list, got {values[name]!r}.")
        values["layers"] = tuple(LayerStructure.from_dict(layer) for layer in values["layers"])
        values["linears"] = tuple(values["linears"])
        return cls(**values)


def structure_of(model: PreTrainedModel) -> ModelStructure:
    """Reads the structure off a model, with or without adapters on it; no weight is touched.

    Raises:
        ValueError: experts were replaced by novices since the model was loaded.
    """
    return ModelStructure(
        hidden_size=_hidden_size(model),
        layers=tuple(_layer_structure(layer) for layer in moe_layers(model)),
        linears=tuple(_packed_linears(model)),
        adapter=adapter_settings(model),
    )


def apply_structure(model: PreTrainedModel, *, structure: ModelStructure) -> PeftModel | None:
    """Gives a model that its source just gave, or that has part of it already, this structure, in place.

    Cuts, packs and puts adapters in, in this order. What is there already is left as it is. The weights are the
    source's: those that were trained or refitted since have to be loaded afterwards. Adapters begin at random.

    Returns:
        PEFT's model around the adapters, if they were put in now.

    Raises:
        ValueError: the structure is of another model, or the model has a cut, 4-bit layers or an adapter that the
            structure has not.
    """
    apply_cut(model, structure=structure)
    _pack(model, structure)
    present = adapter_settings(model)
    if structure.adapter == present:
        return None
    if structure.adapter is None or present is not None:
        wanted, here = dict(structure.adapter or {}), present or {}
        key = next(key for key in sorted(wanted | here) if wanted.get(key) != here.get(key))
        raise ValueError(
            f"The model has another adapter than the checkpoint: PEFT's `{key}` is {here.get(key)!r} here and "
            f"{wanted.get(key)!r} there. {_ADVICE}"
        )
    return add_adapter(model, settings=structure.adapter)


def apply_cut(model: PreTrainedModel, *, structure: ModelStructure) -> None:
    """Only the cut: experts lose the channels, and routers the experts, that the structure has not; in place.

    Raises:
        ValueError: the structure is of another model, or the model has another cut.
    """
    layers = moe_layers(model)
    _check_source(model, layers, structure)
    for layer, wanted in zip(layers, structure.layers, strict=True):
        if wanted.origin is not None:
            _cut(layer, wanted.origin)
        elif isinstance(layer.base_experts, ChannelExperts):
            raise ValueError(
                f"The checkpoint was written by a run that pruned nothing, and here '{layer.name}' is prepared for "
                f"cuts. {_ADVICE}"
            )
    if any(layer.origin is not None for layer in structure.layers):
        save_with_widths(model)


_ADVICE = "Resume with the callbacks and settings it was trained with, and a module that was just made."


def _cut(layer: MoeLayer, wanted: Origin) -> None:
    _check_rebuildable(layer)
    origin = _origin(layer.base_experts)
    untouched = layer.experts is layer.base_experts
    missing = int((wanted.kept_C & ~origin.kept_C).sum())
    if missing or (origin.refitted and not wanted.refitted):
        what = f"has lost {missing} channels that the checkpoint has" if missing else "was repaired, the checkpoint not"
        raise ValueError(f"The model has another cut than the checkpoint: '{layer.name}' {what}. {_ADVICE}")
    if untouched:
        layer.block.set_submodule(layer.family.experts, to_channel_experts(layer.experts))
    if not torch.equal(wanted.kept_C, origin.kept_C):
        if not untouched:
            raise ValueError(
                f"The model has another cut than the checkpoint: '{layer.name}' has adapters already, and "
                f"{int(origin.kept_C.sum())} channels, not {int(wanted.kept_C.sum())}. {_ADVICE}"
            )
        cut_layer(layer, keep_C=wanted.kept_C[origin.kept_C])
    experts = layer.base_experts
    assert isinstance(experts, ChannelExperts)
    experts.origin = replace(experts.origin, refitted=wanted.refitted)


def _pack(model: PreTrainedModel, structure: ModelStructure) -> None:
    packed, linears = [wanted.packed for wanted in structure.layers], set(structure.linears)
    here, here_linears = [_is_packed(layer) for layer in moe_layers(model)], set(_packed_linears(model))
    if packed == here and linears == here_linears:
        return
    here_alone = [layer.name for layer, a, b in zip(structure.layers, here, packed, strict=True) if a and not b]
    here_alone += sorted(here_linears - linears)
    if here_alone or adapter_settings(model) is not None:
        what = f"'{here_alone[0]}' is in 4 bit" if here_alone else "its adapters are on weights of 16 bit"
        raise ValueError(f"The checkpoint's model is stored in other types than this one: here {what}. {_ADVICE}")
    for layer, is_packed in zip(moe_layers(model), packed, strict=True):
        if is_packed and isinstance(layer.experts, ChannelExperts):
            pack_experts(layer.experts)
    for name in linears - here_linears:
        model.set_submodule(name, pack_linear(_linear(model, name)))
    model.requires_grad_(False)


def _check_source(model: PreTrainedModel, layers: list[MoeLayer], structure: ModelStructure) -> None:
    """Names, widths and hidden size of the model as its source gave it must be those of the structure's."""
    pairs: list[tuple[str, object, object]] = [
        ("the hidden size", structure.hidden_size, _hidden_size(model)),
        ("the list of MoE layers", [wanted.name for wanted in structure.layers], [layer.name for layer in layers]),
    ]
    for layer, wanted in zip(layers, structure.layers, strict=False):
        if wanted.origin is not None:
            widths = _origin(layer.base_experts).widths
            pairs.append((f"the list of widths of '{layer.name}' as loaded", wanted.origin.widths, widths))
    for what, there, here in pairs:
        if there != here:
            raise ValueError(
                f"The checkpoint is of another model: {what} is {there} there and {here} here. Name the `source` that "
                "it was trained from, or the checkpoint of this one."
            )


def _layer_structure(layer: MoeLayer) -> LayerStructure:
    experts = layer.base_experts
    _check_rebuildable(layer)
    origin = experts.origin if isinstance(experts, ChannelExperts) else None
    return LayerStructure(name=layer.name, origin=origin, packed=_is_packed(layer))


def _check_rebuildable(layer: MoeLayer) -> None:
    if _origin(layer.base_experts).replaced:
        raise ValueError(
            f"'{layer.name}' has novices, which cannot be made again from its source. Save the model with "
            "`save_ragged`, and train the one that is loaded from there."
        )


def _origin(experts: nn.Module) -> Origin:
    return experts.origin if isinstance(experts, ChannelExperts) else Origin.whole(expert_widths(experts))


def _is_packed(layer: MoeLayer) -> bool:
    experts = layer.base_experts
    return isinstance(experts, ChannelExperts) and experts.packed


def _packed_linears(model: PreTrainedModel) -> list[str]:
    """Names in the bare model: PEFT calls what is inside an adapter layer `base_layer`."""
    names = [name for name, module in model.named_modules() if isinstance(module, Linear4bit)]
    return [name.removesuffix(".base_layer") for name in names]


def _linear(model: PreTrainedModel, name: str) -> nn.Linear:
    module = dict(model.named_modules()).get(name)
    if not isinstance(module, nn.Linear):
        raise ValueError(
            f"The checkpoint is of another model: '{name}' is a Linear layer there and {type(module).__name__} here. "
            "Name the `source` that it was trained from, or the checkpoint of this one."
        )
    return module


def _hidden_size(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config().hidden_size)


def _checked_name(name: object) -> str:
    if not isinstance(name, str) or not name or not name.isprintable():
        raise ValueError(f"`name` of a layer must be the full name of its experts, got {name!r:.80}.")
    return name


def _checked(content: object, *, keys: set[str], what: str) -> dict[str, Any]:
    if not isinstance(content, Mapping) or set(content) != keys:
        came = sorted(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f"{what} must hold exactly the keys {sorted(keys)}, got {came}.")
    return dict(content)
