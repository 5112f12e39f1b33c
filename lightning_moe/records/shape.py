"""What a pruning plan needs to know of a model: its MoE layers, their experts and their routers.

Channels of a layer are flat: the experts' channels laid end to end in router order, C = sum of the widths.
"""

# C channels of a layer, E experts, G router groups

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any, Self

import torch
from torch import Tensor


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _checked_fields(record: type, content: object, *, what: str) -> dict[str, Any]:
    names = {field.name for field in fields(record)}
    if not isinstance(content, Mapping) or set(content) != names:
        came = sorted(content) if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f"{what} must hold exactly the keys {sorted(names)}, got {came}.")
    return dict(content)


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """One MoE layer.

    Args:
        name: Full module name of the experts module, for example `model.layers.0.mlp.experts`.
        widths: Intermediate channels of each expert, in router order; 0 for a masked expert or a novice of a cut model.
        top_k: Experts that the router chooses for a token.
        num_groups: Groups of neighbouring experts that the router chooses first (1 = ungrouped).
        top_k_groups: Groups that are chosen for a token.

    Raises:
        ValueError: a number is out of range; the message names the layer.

    Examples:
        >>> layer = LayerShape(name="model.layers.0.mlp.experts", widths=(16, 0, 32), top_k=2)
        >>> layer.num_experts, layer.num_channels, layer.offsets
        (3, 48, (0, 16, 16, 48))
    """

    name: str
    widths: tuple[int, ...]
    top_k: int
    num_groups: int = 1
    top_k_groups: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name or not self.name.isprintable():
            raise ValueError(f"`name` of a layer must be the full name of its experts module, got {self.name!r}.")
        if not isinstance(self.widths, tuple) or not all(_is_count(width) and width >= 0 for width in self.widths):
            raise ValueError(f"{self.name}: `widths` must be a tuple of counts >= 0, got {self.widths!r:.200}.")
        if sum(self.widths) == 0:
            raise ValueError(f"{self.name}: a layer needs at least one channel, got widths {self.widths!r:.200}.")
        allowed = {"top_k": self.num_experts, "num_groups": self.num_experts, "top_k_groups": self.num_groups}
        for field, highest in allowed.items():
            value = getattr(self, field)
            if not _is_count(value) or not 1 <= value <= highest:
                raise ValueError(f"{self.name}: `{field}` must be between 1 and {highest}, got {value!r:.200}.")
        if self.num_experts % self.num_groups:
            raise ValueError(
                f"{self.name}: `num_groups` must divide the number of experts {self.num_experts}, "
                f"got {self.num_groups}."
            )

    @property
    def num_experts(self) -> int:
        """Experts of the router, masked ones included."""
        return len(self.widths)

    @property
    def num_channels(self) -> int:
        """Channels of all experts together (C)."""
        return sum(self.widths)

    @property
    def offsets(self) -> tuple[int, ...]:
        """First flat channel of each expert, and C at the end (E + 1 numbers)."""
        return tuple(accumulate(self.widths, initial=0))

    @property
    def group_of_expert(self) -> Tensor:
        """Router group of each expert, int64 [E]."""
        return torch.arange(self.num_experts) // (self.num_experts // self.num_groups)

    def check_reachable(self, widths: Sequence[int]) -> None:
        """Refuses widths that leave a token with too few experts.

        At least `top_k` experts of width > 0 must stay in any choice of `top_k_groups` groups, and a router with
        groups needs two of them in every group, because it ranks a group by the sum of its two best.

        Args:
            widths: Kept channels of each expert, E numbers.

        Raises:
            ValueError: too few experts stay; the message names the layer and the counts.
        """
        alive_E = torch.tensor([width > 0 for width in widths])
        alive_G = torch.bincount(self.group_of_expert[alive_E], minlength=self.num_groups)
        reachable = int(alive_G.sort().values[: self.top_k_groups].sum())
        if reachable < self.top_k:
            raise ValueError(
                f"{self.name}: a token needs top_k={self.top_k} experts, only {reachable} of {self.num_experts} can be "
                f"reached (experts per router group: {alive_G.tolist()}). Prune less or evict fewer experts."
            )
        needed = min(2, self.num_experts // self.num_groups)
        if self.num_groups > 1 and int(alive_G.min()) < needed:
            raise ValueError(
                f"{self.name}: every router group needs {needed} experts, got {alive_G.tolist()}. Prune less."
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return {field.name: getattr(self, field.name) for field in fields(self)} | {"widths": list(self.widths)}

    @classmethod
    def from_dict(cls, content: object) -> Self:
        """The inverse of `to_dict`.

        Raises:
            ValueError: keys or values do not fit.
        """
        values = _checked_fields(cls, content, what="A layer's shape")
        if not isinstance(values["widths"], list | tuple):
            raise ValueError(f"`widths` of a layer must be a list of counts, got {values['widths']!r:.200}.")
        values["widths"] = tuple(values["widths"])
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The MoE layers of one model, and a fingerprint that tells it from another of the same shape.

    Args:
        model_type: `model_type` of the model's config.
        hidden_size: H.
        layers: One shape per MoE layer, first layer first.
        router_digest: SHA-256 of the router weights rounded to bfloat16.

    Raises:
        ValueError: no layers, a name twice, or a value of the wrong kind.
    """

    model_type: str
    hidden_size: int
    layers: tuple[LayerShape, ...]
    router_digest: str

    def __post_init__(self) -> None:
        if not isinstance(self.model_type, str) or not isinstance(self.router_digest, str):
            raise ValueError(
                f"`model_type` and `router_digest` must be text, got {self.model_type!r} and {self.router_digest!r}."
            )
        if not _is_count(self.hidden_size) or self.hidden_size < 1:
            raise ValueError(f"`hidden_size` must be a count >= 1, got {self.hidden_size!r}.")
        if not self.layers or not all(isinstance(layer, LayerShape) for layer in self.layers):
            raise ValueError(f"`layers` must be a tuple with at least one LayerShape, got {self.layers!r:.200}.")
        names = [layer.name for layer in self.layers]
        if len(set(names)) < len(names):
            raise ValueError(f"`layers` must have different names, got {names!r:.200}.")

    @property
    def num_channels(self) -> int:
        """Channels of all experts of all layers."""
        return sum(layer.num_channels for layer in self.layers)

    @property
    def is_uneven(self) -> bool:
        """Whether some layer has experts of different widths: no model is published so, it was cut."""
        return any(len(set(layer.widths)) > 1 for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        content = {field.name: getattr(self, field.name) for field in fields(self)}
        return content | {"layers": [layer.to_dict() for layer in self.layers]}

    @classmethod
    def from_dict(cls, content: object) -> Self:
        """The inverse of `to_dict`.

        Raises:
            ValueError: keys or values do not fit.
        """
        values = _checked_fields(cls, content, what="A model's shape")
        if not isinstance(values["layers"], list | tuple):
            raise ValueError(f"`layers` of a model must be a list, got {values['layers']!r:.200}.")
        values["layers"] = tuple(LayerShape.from_dict(layer) for layer in values["layers"])
        return cls(**values)
