"""The decision: which channels of which experts stay."""

# C channels of a layer, E experts

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from lightning_moe.files import read_json, write_atomically
from lightning_moe.records.masks import mask_from_hex, mask_to_hex
from lightning_moe.records.shape import LayerShape, ModelShape
from lightning_moe.records.statistics import check_record

_KIND = "prune plan"
_VERSION = 1
_KEYS = ("method", "prune_ratio", "align", "provenance")


@dataclass(frozen=True, kw_only=True, eq=False)
class PrunePlan:
    """Kept channels of every layer of one model.

    Args:
        shape: The model that the plan was made for.
        method: Name of the method that made it.
        prune_ratio: Share of routed-expert channels that was asked to be removed, in [0, 1).
        align: Widths are multiples of this where anything was removed.
        keep: Per layer bool [C], true for a channel that stays.
        provenance: Where the plan comes from (criterion, corpora, digests): free text by name, not part of the digest.

    Raises:
        ValueError: a mask has the wrong form, a layer keeps fewer experts than a token needs, a number is out of range.
    """

    shape: ModelShape
    method: str
    prune_ratio: float
    align: int
    keep: tuple[Tensor, ...]
    provenance: Mapping[str, str]

    def __post_init__(self) -> None:
        if isinstance(self.prune_ratio, bool) or not isinstance(self.prune_ratio, int | float):
            raise ValueError(f"`prune_ratio` must be a number in [0, 1), got {self.prune_ratio!r}.")
        if not 0 <= self.prune_ratio < 1:
            raise ValueError(f"`prune_ratio` must be in [0, 1), got {self.prune_ratio}. It is the share that goes.")
        if isinstance(self.align, bool) or not isinstance(self.align, int) or self.align < 1:
            raise ValueError(f"`align` must be a count >= 1, got {self.align!r}.")
        texts = [self.method, *self.provenance, *self.provenance.values()]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"`method` and `provenance` must be text, got {texts!r:.200}.")
        if not self.method.isprintable():  # it is shown in logs, tables and model cards
            raise ValueError(f"`method` must be printable text, got {self.method!r:.80}.")
        if len(self.keep) != len(self.shape.layers):
            raise ValueError(f"`keep` must have {len(self.shape.layers)} layers, got {len(self.keep)}.")
        for index, (layer, keep_C) in enumerate(zip(self.shape.layers, self.keep, strict=True)):
            if keep_C.dtype != torch.bool or tuple(keep_C.shape) != (layer.num_channels,):
                raise ValueError(
                    f"{layer.name}: `keep` must be bool of shape ({layer.num_channels},), "
                    f"got {keep_C.dtype} of shape {tuple(keep_C.shape)}."
                )
            layer.check_reachable(self.widths(index))

    def widths(self, layer_index: int) -> tuple[int, ...]:
        """Kept channels of each expert of a layer, in router order.

        Examples:
            >>> keep_C = torch.tensor([True, False, True, True, False, False])
            >>> plan = PrunePlan(
            ...     shape=shape_of([4, 2]), method="by_hand", prune_ratio=0.5, align=1, keep=(keep_C,), provenance={}
            ... )
            >>> plan.widths(0)
            (3, 0)
        """
        parts = self.keep[layer_index].split(self.shape.layers[layer_index].widths)
        return tuple(int(part.sum()) for part in parts)

    def evicted(self, layer_index: int) -> tuple[int, ...]:
        """Indices of the experts that this plan removes as a whole (those that had no channel before do not count)."""
        before = self.shape.layers[layer_index].widths
        return tuple(e for e, width in enumerate(self.widths(layer_index)) if width == 0 and before[e] > 0)

    @property
    def num_kept(self) -> int:
        """Kept channels of all layers."""
        return sum(int(keep_C.sum()) for keep_C in self.keep)

    @property
    def achieved_prune_ratio(self) -> float:
        """Share of the channels that really goes."""
        return 1 - self.num_kept / self.shape.num_channels

    @cached_property
    def digest(self) -> str:
        """SHA-256 over what is kept, of which model, by which method; provenance left out."""
        content = {key: value for key, value in self.to_dict().items() if key != "provenance"}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def summary(self) -> str:
        """A table for people: one line per layer."""
        lines = [
            f"{self.method}: prune_ratio {self.prune_ratio:.4g} asked, {self.achieved_prune_ratio:.4g} achieved "
            f"(keep_ratio {1 - self.achieved_prune_ratio:.4g}), align {self.align}",
            f"{self.num_kept:,} of {self.shape.num_channels:,} channels stay"
            + ("; the model was cut before, and ratios count from what was left" if self.shape.is_uneven else ""),
            f"{'layer':<44} {'experts':>9} {'channels':>17} {'kept':>7} {'widths (min/median/max)':>25}",
        ]
        for index, layer in enumerate(self.shape.layers):
            alive = sorted(width for width in self.widths(index) if width > 0)
            channels = f"{sum(alive):,}/{layer.num_channels:,}"
            spread = f"{alive[0]}/{alive[len(alive) // 2]}/{alive[-1]}"
            experts = f"{len(alive)}/{layer.num_experts}"
            share = sum(alive) / layer.num_channels
            lines.append(f"{layer.name:<44} {experts:>9} {channels:>17} {share:>7.1%} {spread:>25}")
        return "\n".join(lines)

    def check_fits(self, shape: ModelShape) -> None:
        """Refuses a model that the plan was not made for.

        Raises:
            ValueError: names the first difference; the router's weights come last.
        """
        mine, theirs = self.shape.to_dict(), shape.to_dict()
        if len(mine["layers"]) != len(theirs["layers"]):
            differences = [("number of MoE layers", len(mine["layers"]), len(theirs["layers"]))]
        else:
            pairs = [("model", mine, theirs)]
            pairs += [(own["name"], own, other) for own, other in zip(mine["layers"], theirs["layers"], strict=True)]
            differences = [
                (f"{key} of {where}", own[key], other[key])
                for where, own, other in pairs
                for key in own
                if key not in ("layers", "router_digest") and own[key] != other[key]
            ]
        if differences:
            what, planned, came = differences[0]
            raise ValueError(
                f"The plan was made for another model: {what} is {_shortened(came)} here and {_shortened(planned)} in "
                f"the plan. {self._advice(shape)}"
            )
        if self.shape.router_digest != shape.router_digest:
            raise ValueError(
                f"The plan was made for another model: router_digest of model is {shape.router_digest} here and "
                f"{self.shape.router_digest} in the plan, all else agrees. This is another checkpoint of the same "
                "shape, or the same one loaded in another type than for calibration. Load the checkpoint that was "
                "calibrated, with the same `dtype`, or calibrate and plan this one."
            )

    def _advice(self, shape: ModelShape) -> str:
        """What to do about a model of another shape."""
        if shape.num_channels < self.shape.num_channels and shape.model_type == self.shape.model_type:
            return (
                f"This model seems to be cut already: it has {shape.num_channels:,} channels and the plan is for "
                f"{self.shape.num_channels:,}. To cut it further, calibrate and plan it as it is now."
            )
        return "Calibrate and plan this model, or load the one the plan was made for."

    def to_dict(self) -> dict[str, Any]:
        """Plain types; one hexadecimal mask per expert, first channel in the highest bit."""
        content: dict[str, Any] = {"kind": _KIND, "version": _VERSION}
        content |= {"method": self.method, "prune_ratio": self.prune_ratio, "align": self.align}
        content |= {"provenance": dict(self.provenance), "shape": self.shape.to_dict()}
        layers = zip(self.shape.layers, self.keep, strict=True)
        return content | {"keep": {layer.name: _to_hex(keep_C, widths=layer.widths) for layer, keep_C in layers}}

    def save(self, path: str | Path) -> None:
        """Writes `to_dict` as JSON, one line per expert."""
        with write_atomically(path) as temporary:
            temporary.write_text(_dump(self.to_dict(), indent="") + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads what `save` wrote; every length is checked before a mask is made.

        Raises:
            ValueError: the file is missing, truncated, of another kind or version, or its lengths do not fit; the
                message names the file.
        """
        return cls.from_dict(read_json(path, what=_KIND), source=path)

    @classmethod
    def from_dict(cls, content: Any, *, source: str | Path = "checkpoint") -> Self:
        """The inverse of `to_dict`.

        Args:
            content: what `to_dict` gave.
            source: where it comes from, for messages.

        Raises:
            ValueError: see `load`.
        """
        check_record({"record": content}, kind=_KIND, version=_VERSION, path=source)
        try:
            shape = ModelShape.from_dict(content["shape"])
            names, masks = [layer.name for layer in shape.layers], content["keep"]
            if not isinstance(masks, dict) or list(masks) != names:
                came = list(masks) if isinstance(masks, dict) else type(masks).__name__
                raise ValueError(f"`keep` must have one entry per layer, {names!r:.200}, got {came!r:.200}.")
            keep = tuple(_from_hex(masks[layer.name], layer=layer) for layer in shape.layers)
            return cls(shape=shape, keep=keep, **{key: content[key] for key in _KEYS})
        except KeyError as error:
            raise ValueError(f"'{source}' is not a valid {_KIND}: {error} is missing. Plan again.") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"'{source}' is not a valid {_KIND}: {error} Plan again.") from error


def _shortened(value: object) -> str:
    """A long list by its beginning and its length."""
    if isinstance(value, list) and len(value) > 8:
        return f"[{', '.join(map(str, value[:8]))}, ...] ({len(value)} numbers)"
    return str(value)


def _to_hex(keep_C: Tensor, *, widths: tuple[int, ...]) -> list[str]:
    return [mask_to_hex(part) for part in keep_C.split(widths)]


def _from_hex(masks: object, *, layer: LayerShape) -> Tensor:
    if not isinstance(masks, list) or len(masks) != layer.num_experts:
        raise ValueError(f"{layer.name}: `keep` must be a list of {layer.num_experts} masks.")
    parts = [
        mask_from_hex(mask, num_channels=width, what=f"{layer.name}: the mask of expert {expert}")
        for expert, (mask, width) in enumerate(zip(masks, layer.widths, strict=True))
    ]
    return torch.cat(parts)


def _dump(value: object, *, indent: str) -> str:
    """JSON in which every list of text and every mapping is broken into lines, and every list of numbers is not."""
    inner = indent + " "
    if isinstance(value, dict) and value:
        items = [f"{inner}{json.dumps(key)}: {_dump(item, indent=inner)}" for key, item in value.items()]
        return "{\n" + ",\n".join(items) + f"\n{indent}}}"
    if isinstance(value, list) and value and not isinstance(value[0], int):
        return "[\n" + ",\n".join(inner + _dump(item, indent=inner) for item in value) + f"\n{indent}]"
    return json.dumps(value)
