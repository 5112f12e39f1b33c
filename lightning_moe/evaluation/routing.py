"""How the routers use their experts: load, entropy and dead experts of every layer, added up over batches.

T tokens, E experts of a layer, K experts per token, H hidden.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_moe.calibration.observer import evaluating
from lightning_moe.models.discovery import moe_layers
from lightning_moe.models.router_logits import RouterOutput, watch_routers
from lightning_moe.models.routers import row_tensor, without_adapter
from lightning_moe.reporting.checks import check_known, check_mapping, check_rows


@dataclass(frozen=True, kw_only=True)
class LayerRouting:
    """How one layer routed some text.

    Args:
        entropy: mean over tokens of the router's entropy, as a share of its maximum log E; 0: always one expert, 1: all
            alike. E counts the experts that are not evicted.
        load: share of the routed pairs (a token and one of its K experts) of each expert, in the router's order.
        evicted: experts that can never be chosen but still have their place in the router.
        num_tokens: tokens that were routed, padding left out.
    """

    entropy: float
    load: tuple[float, ...]
    evicted: tuple[int, ...]
    num_tokens: int

    @property
    def num_experts(self) -> int:
        """Experts that can be chosen."""
        return len(self.load) - len(self.evicted)

    @property
    def dead_experts(self) -> int:
        """Experts that could be chosen and got no token."""
        return sum(load == 0 for load in self.load) - len(self.evicted)

    @property
    def max_load(self) -> float:
        """The largest load over the mean load: 1 where all experts get the same, at most E."""
        return max(self.load) * self.num_experts

    def to_dict(self) -> dict[str, Any]:
        """Plain types, the derived numbers among them."""
        derived = {"dead_experts": self.dead_experts, "max_load": self.max_load}
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()} | derived

    @classmethod
    def from_dict(cls, content: object, *, where: str) -> "LayerRouting":
        """What `to_dict` made.

        Args:
            content: plain types.
            where: what it is of, for messages.

        Raises:
            ValueError: something is missing or has the wrong kind.
        """
        layer = check_mapping(content, where=where)
        loads, evicted = check_rows(layer, key="load", where=where), check_rows(layer, key="evicted", where=where)
        places = [index for index in evicted if type(index) is int and 0 <= index < len(loads)]
        if not loads or len(set(places)) < len(evicted):
            raise ValueError(f"'evicted' of {where} must name different experts of its 'load', got {len(loads)} loads.")
        by_expert = dict(enumerate(loads))
        return cls(
            entropy=_finite(layer, key="entropy", where=where),
            load=tuple(_finite(by_expert, key=index, where=f"'load' of {where}") for index in by_expert),
            evicted=tuple(places),
            num_tokens=int(_finite(layer, key="num_tokens", where=where)),
        )


@dataclass(frozen=True, kw_only=True)
class RoutingTable:
    """How every layer routed every corpus at one step of a run.

    Args:
        step: optimizer steps behind the run.
        corpora: corpus -> one entry per MoE layer, in the order of the decoder.
    """

    step: int
    corpora: Mapping[str, tuple[LayerRouting, ...]]

    def entropies(self) -> dict[str, list[float]]:
        """Corpus -> mean entropy of each layer."""
        return {name: [layer.entropy for layer in layers] for name, layers in self.corpora.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
        corpora = {name: [layer.to_dict() for layer in layers] for name, layers in self.corpora.items()}
        return {"step": self.step, "corpora": corpora}

    @classmethod
    def from_dict(cls, content: object, *, where: str = "the record of the routers") -> "RoutingTable":
        """What `to_dict` made.

        Args:
            content: plain types.
            where: what it is of, for messages.

        Raises:
            ValueError: something is missing or has the wrong kind.
        """
        table = check_mapping(content, where=where)
        corpora = check_mapping(table.get("corpora"), where=f"'corpora' of {where}")
        layers = {name: check_rows(corpora, key=name, where=where) for name in corpora}
        if not all(layers.values()):
            raise ValueError(f"Every corpus in 'corpora' of {where} needs layers, got none of {sorted(layers)[:8]}.")
        return cls(
            step=int(_finite(table, key="step", where=where)),
            corpora={
                name: tuple(LayerRouting.from_dict(layer, where=f"{str(name)!r} of {where}") for layer in own)
                for name, own in layers.items()
            },
        )


def _finite(content: Mapping[Any, Any], *, key: Any, where: str) -> float:
    value = check_known(content, key=key, where=where)
    if value is None:
        raise ValueError(f"'{key}' of {where} must be a number, got null.")
    return value


def routing_sums(output: RouterOutput, *, counted_T: Tensor | None = None) -> dict[str, Tensor]:
    """What one batch adds to a layer's sums, float64: `count` `[E]`, `evicted` `[E]`, `entropy` and `num_tokens`.

    Args:
        output: of the layer's router.
        counted_T: false for padding; None: every token counts.
    """
    probability_TE, evicted_E = output.probability().double(), output.evicted()
    counted_T = torch.ones_like(probability_TE[:, 0]) if counted_T is None else counted_T.to(probability_TE)
    highest = (~evicted_E).sum().double().log().clamp_min(torch.finfo(torch.float32).tiny)
    entropy_T = torch.special.entr(probability_TE).sum(-1) / highest
    counted_TK = counted_T.unsqueeze(1).expand(output.index_TK.shape)
    count_E = torch.zeros_like(probability_TE[0])
    return {
        "count": count_E.scatter_add_(0, output.index_TK.reshape(-1), counted_TK.reshape(-1)),
        "evicted": evicted_E.double(),
        "entropy": (entropy_T * counted_T).sum().reshape(1),
        "num_tokens": counted_T.sum().reshape(1),
    }


def layer_routing(sums: Mapping[str, Tensor]) -> LayerRouting:
    """The shares of one layer; all zero where it routed nothing."""
    num_tokens, count_E = float(sums["num_tokens"]), sums["count"]
    load_E = count_E / count_E.sum().clamp_min(1.0)
    return LayerRouting(
        entropy=float(sums["entropy"]) / max(num_tokens, 1.0),
        load=tuple(load_E.tolist()),
        evicted=tuple(torch.nonzero(sums["evicted"]).flatten().tolist()),
        num_tokens=int(num_tokens),
    )


def routing_scalars(layers: Sequence[LayerRouting], *, per_layer: bool) -> dict[str, float]:
    """What a logger gets: mean entropy, dead experts of all layers, largest load of any; and each layer's own."""
    scalars = {
        "router/entropy": sum(layer.entropy for layer in layers) / len(layers),
        "router/dead_experts": float(sum(layer.dead_experts for layer in layers)),
        "router/max_load": max(layer.max_load for layer in layers),
    }
    for index, layer in enumerate(layers if per_layer else ()):
        scalars[f"router/entropy/{index}"] = layer.entropy
        scalars[f"router/dead_experts/{index}"] = float(layer.dead_experts)
        scalars[f"router/max_load/{index}"] = layer.max_load
    return scalars


class RoutingMeter:
    """Adds up the routing of a model over forward passes; several meters may watch one model at different times.

    Args:
        model: any supported Mixture-of-Experts model, as it is now: after a cut that evicts experts, make a new meter.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._sums: list[dict[str, Tensor]] = []
        self._counted_T: Tensor | None = None
        for layer in moe_layers(model):
            weight_EH = row_tensor(without_adapter(layer.router), "weight")
            new = {"count": weight_EH.shape[0], "evicted": weight_EH.shape[0], "entropy": 1, "num_tokens": 1}
            sums = {key: torch.zeros(n, dtype=torch.float64, device=weight_EH.device) for key, n in new.items()}
            self._sums.append(sums)

    def watch(self, model: PreTrainedModel) -> ExitStack:
        """Adds up every forward pass until the returned stack is closed; padding is read off the model's arguments.

        A mask that is not `[batch, tokens]` of the same tokens is not used: every token counts.
        """
        stack = watch_routers(moe_layers(model), see=self._add)
        base = model.base_model
        stack.callback(base.register_forward_pre_hook(self._read_mask, with_kwargs=True).remove)
        return stack

    def compute(self, *, reduce: Callable[[Tensor], Tensor] | None = None) -> tuple[LayerRouting, ...]:
        """What was seen, layer by layer.

        Args:
            reduce: sums a tensor `[N]` over the processes that share the text; called once.
        """
        sums = self._sums if reduce is None else _reduced(self._sums, reduce=reduce)
        return tuple(layer_routing(layer) for layer in sums)

    def _read_mask(self, _module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        usable = isinstance(mask, Tensor) and mask.dim() == 2
        self._counted_T = (mask != 0).reshape(-1) if usable else None

    @torch.no_grad()
    def _add(self, output: RouterOutput) -> None:
        fits = self._counted_T is not None and len(self._counted_T) == len(output.logits_TE)
        added = routing_sums(output, counted_T=self._counted_T if fits else None)
        for key, value in self._sums[output.index].items():
            value += added[key].to(value.device)


def _reduced(sums: Sequence[dict[str, Tensor]], *, reduce: Callable[[Tensor], Tensor]) -> list[dict[str, Tensor]]:
    parts = [value for layer in sums for value in layer.values()]
    total = reduce(torch.cat([part.to(parts[0].device) for part in parts]))
    pieces = iter(total.split([len(part) for part in parts]))
    return [{key: next(pieces) for key in layer} for layer in sums]


@torch.no_grad()
def measure_routing(
    model: PreTrainedModel,
    *,
    loaders: Mapping[str, Iterable[Mapping[str, Tensor]]],
    num_batches: int | None = None,
    step: int = 0,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> RoutingTable:
    """Runs text through the model; batches hold `input_ids` and perhaps `attention_mask`, `[B, S]`.

    Args:
        model: any supported Mixture-of-Experts model.
        loaders: of each corpus.
        num_batches: batches of each corpus; None: all.
        step: noted in the table.
        reduce: sums a tensor `[N]` over processes that read different batches.

    Raises:
        ValueError: the batches are something else.
    """
    device = next(model.parameters()).device
    meters = {name: RoutingMeter(model) for name in loaders}
    with evaluating(model):
        for name, loader in loaders.items():
            with meters[name].watch(model):
                for batch in islice(loader, num_batches):
                    inputs = {key: value.to(device) for key, value in _inputs(batch).items()}
                    model(**inputs, use_cache=False)
    return RoutingTable(step=step, corpora={name: meter.compute(reduce=reduce) for name, meter in meters.items()})


def _inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        raise ValueError(f"Routing is measured on batches that are dicts with `input_ids`, got {type(batch).__name__}.")
    return {key: batch[key] for key in ("input_ids", "attention_mask") if key in batch}
