"""Running sums of one calibration, per corpus and layer, that serve every criterion."""

# C channels of a layer, E experts, H hidden size, B bins of the router entropy

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from lightning_moe.files import LazyTensors, digest_of_tensors, open_tensors, write_tensors
from lightning_moe.records.shape import LayerShape, ModelShape

Layers = tuple[Mapping[str, Tensor], ...]

NUM_ENTROPY_BINS = 32
WEIGHT_NORMS = ("gate_sq_norm", "up_sq_norm", "down_sq_norm")
# Sums of absolute weights: calibration always takes them, older files do without.
WEIGHT_ABS_SUMS = ("gate_abs_sum", "up_abs_sum", "down_abs_sum")
_KIND = "calibration statistics"
_VERSION = 1
# Norms of the same weights differ between machines in the last bits of a float64 sum, never by more than this.
_SAME_WEIGHTS = 1e-6


@dataclass(frozen=True, kw_only=True)
class Statistic:
    """How one statistic is stored: a letter per dimension, may it be negative, may it be missing."""

    dims: str
    signed: bool = False
    optional: bool = False

    def size(self, layer: LayerShape, *, hidden_size: int) -> tuple[int, ...]:
        """The tensor's shape in `layer`.

        Examples:
            >>> layer = LayerShape(name="experts", widths=(4, 2), top_k=1)
            >>> [STATISTICS[name].size(layer, hidden_size=64) for name in ("count", "hidden_sq", "output_sum")]
            [(2,), (6,), (2, 64)]
        """
        sizes = {"C": layer.num_channels, "E": layer.num_experts, "H": hidden_size, "B": NUM_ENTROPY_BINS}
        return tuple(sizes[dim] for dim in self.dims)


# Sums over tokens (T) or routed pairs that are not padding; `max_*` are maxima. Formulas: README, calibration.
# `input_sq`, squares of what goes into an expert, is for Wanda scores of single weights; no criterion here reads it.
STATISTICS: Mapping[str, Statistic] = {
    "num_tokens": Statistic(dims=""),
    "layer_energy": Statistic(dims=""),
    "attribution": Statistic(dims="E", signed=True),
    "ablation": Statistic(dims="E"),
    "channel_saliency": Statistic(dims="C"),
    "channel_ablation": Statistic(dims="C"),
    "gate_sq": Statistic(dims="C"),
    "up_sq": Statistic(dims="C"),
    "hidden_sq": Statistic(dims="C"),
    "weighted_sq": Statistic(dims="C"),
    "max_weighted_sq": Statistic(dims="C"),
    "weighted_norm": Statistic(dims="E"),
    "norm": Statistic(dims="E"),
    "sq_norm": Statistic(dims="E"),
    "gate_weight": Statistic(dims="E"),
    "count": Statistic(dims="E"),
    "max_abs": Statistic(dims="E"),
    "router_probability": Statistic(dims="E"),
    "entropy_histogram": Statistic(dims="B"),
    "output_sum": Statistic(dims="EH", signed=True, optional=True),
    "output_sq": Statistic(dims="EH", optional=True),
    "input_sq": Statistic(dims="EH", optional=True),
    "output_gram": Statistic(dims="EE", signed=True, optional=True),
    "loss_snip": Statistic(dims="C", signed=True, optional=True),
    "loss_taylor": Statistic(dims="C", optional=True),
}
# What `calibrate` gathers the optional ones with.
_OPTIONS = {
    name: "`gradients` true" if name.startswith("loss_") else "`moments` true"
    for name, statistic in STATISTICS.items()
    if statistic.optional
}
REQUIRED = frozenset(name for name, statistic in STATISTICS.items() if not statistic.optional)


def check_numbers(value: Tensor, *, size: tuple[int, ...], signed: bool, what: str) -> None:
    """Refuses a tensor that is not float64 of shape `size` in main memory, finite and, unless `signed`, nonnegative.

    Raises:
        ValueError: with `what` at the front of the message.
    """
    if value.dtype != torch.float64 or tuple(value.shape) != size:
        raise ValueError(f"{what} must be float64 of shape {size}, got {value.dtype} of shape {tuple(value.shape)}.")
    if value.device.type != "cpu":
        raise ValueError(f"{what} must be in main memory, got a tensor on {value.device}. Move it with `.cpu()`.")
    if not value.numel():
        return
    lowest, highest = map(float, torch.aminmax(value))  # one NaN makes both NaN
    if not math.isfinite(lowest) or not math.isfinite(highest):
        raise ValueError(f"{what} holds NaN or infinity. Calibrate in float32 or bfloat16, and look at the weights.")
    if not signed and lowest < 0:
        raise ValueError(f"{what} must not be negative, its smallest value is {lowest}.")


@dataclass(frozen=True, kw_only=True, eq=False)
class CalibrationStatistics:
    """Everything one forward pass over the calibration text left behind.

    Args:
        shape: The model that was calibrated.
        corpora: Corpus name -> one mapping per layer -> statistic name -> float64 tensor (names: `STATISTICS`).
        weights: Per layer `gate_sq_norm`, `up_sq_norm`, `down_sq_norm`: squared L2 norms of each channel's row of
            W_gate, row of W_up and column of W_down, float64 [C]; and, all or none, `gate_abs_sum`, `up_abs_sum`,
            `down_abs_sum`: sums of absolute weights of the same.

    Raises:
        ValueError: a statistic is missing, unknown, misshapen, NaN, infinite or negative, a corpus has no token, or a
            layer has no routed token; the message names the corpus, the layer and the statistic.
    """

    shape: ModelShape
    corpora: Mapping[str, Layers]
    weights: Layers

    def __post_init__(self) -> None:
        if not self.corpora:
            raise ValueError("Calibration statistics need at least one corpus, got none. Name one and calibrate again.")
        self._check_weights()
        for corpus, layers in self.corpora.items():
            self._check_corpus(corpus, layers=layers)
        names = {frozenset(layer) for layers in self.corpora.values() for layer in layers}
        if len(names) > 1:
            differing = sorted(frozenset.union(*names) - frozenset.intersection(*names))
            options = sorted({_OPTIONS[name] for name in differing if name in _OPTIONS})
            raise ValueError(
                f"Every corpus and layer must hold the same statistics; only some have {differing}. Calibrate all of "
                f"them with the same options ({', '.join(options)})."
            )

    def _check_weights(self) -> None:
        if len(self.weights) != len(self.shape.layers):
            raise ValueError(f"`weights` must have {len(self.shape.layers)} layers, got {len(self.weights)}.")
        for layer, norms in zip(self.shape.layers, self.weights, strict=True):
            if set(norms) not in ({*WEIGHT_NORMS}, {*WEIGHT_NORMS, *WEIGHT_ABS_SUMS}):
                raise ValueError(
                    f"{layer.name}: `weights` must hold {list(WEIGHT_NORMS)} and, all or none, "
                    f"{list(WEIGHT_ABS_SUMS)}, got {sorted(norms)}."
                )
            for name, value in norms.items():
                check_numbers(value, size=(layer.num_channels,), signed=False, what=f"{layer.name}: weight norm {name}")

    def _check_corpus(self, corpus: str, *, layers: Layers) -> None:
        if not isinstance(corpus, str) or not corpus:
            raise ValueError(f"A corpus needs a name, got {corpus!r}.")
        if len(layers) != len(self.shape.layers):
            raise ValueError(f"Corpus '{corpus}' must have {len(self.shape.layers)} layers, got {len(layers)}.")
        for layer, statistics in zip(self.shape.layers, layers, strict=True):
            where = f"corpus '{corpus}', {layer.name}"
            _check_names(statistics, where=where)
            for name, value in statistics.items():
                size = STATISTICS[name].size(layer, hidden_size=self.shape.hidden_size)
                check_numbers(value, size=size, signed=STATISTICS[name].signed, what=f"{where}: statistic {name}")
            for name, unit in {"num_tokens": "tokens", "count": "routed tokens"}.items():
                if float(statistics[name].sum()) == 0:
                    raise ValueError(f"{where}: calibration saw 0 {unit}. Give it text, and check the padding mask.")

    def total(self, corpora: Sequence[str] | None = None) -> Layers:
        """One mapping per layer over several corpora: sums add up, maxima take the largest.

        A total is computed each time it is asked for, and shares no memory with the statistics.

        Args:
            corpora: Names; all corpora when not given.

        Raises:
            ValueError: a name is unknown or twice, or the list is empty.
        """
        chosen = list(self.corpora) if corpora is None else list(corpora)
        known = sorted(self.corpora)
        if not chosen or not set(chosen) <= set(known) or len(set(chosen)) < len(chosen):
            raise ValueError(f"`corpora` must name some of {known}, each once, got {chosen}.")
        return add_layers([self.corpora[corpus] for corpus in chosen])

    def merge(self, other: "CalibrationStatistics") -> "CalibrationStatistics":
        """Statistics over the text of both; corpora of the same name add up.

        Raises:
            ValueError: the two come from different models, or a corpus of one lacks statistics that the other's have.

        Examples:
            >>> statistics = one_layer(widths=[4, 4], count=[7, 2])
            >>> statistics.merge(statistics).total()[0]["count"].tolist()
            [14.0, 4.0]
        """
        if self.shape != other.shape:
            raise ValueError("Statistics of models of different shape cannot be merged. Calibrate the same model.")
        for layer, mine, theirs in zip(self.shape.layers, self.weights, other.weights, strict=True):
            for name in (name for name in mine if name in theirs):
                if not torch.allclose(mine[name], theirs[name], rtol=_SAME_WEIGHTS, atol=0.0):
                    raise ValueError(f"{layer.name}: {name} differs, so the weights do. Calibrate the same model.")
        names = dict.fromkeys([*self.corpora, *other.corpora])
        parts = {name: [own.corpora[name] for own in (self, other) if name in own.corpora] for name in names}
        corpora = {name: tuple(dict(layer) for layer in add_layers(part)) for name, part in parts.items()}
        weights = min(self.weights, other.weights, key=lambda layers: len(layers[0]))
        return CalibrationStatistics(shape=self.shape, corpora=corpora, weights=weights)

    def with_sums(self, sums: Mapping[str, Layers]) -> "CalibrationStatistics":
        """These statistics with further optional ones, those of gradients for instance.

        Args:
            sums: every corpus -> one mapping per layer -> statistic name -> float64 tensor; where `num_tokens` is among
                them, it must be that of these statistics.

        Raises:
            ValueError: not the same corpora, layers or numbers of tokens, or what the constructor refuses.
        """
        sizes = {corpus: len(layers) for corpus, layers in sums.items()}
        wanted = dict.fromkeys(self.corpora, len(self.shape.layers))
        if sizes != wanted:
            raise ValueError(
                f"`sums` must be of the corpora and numbers of layers {wanted}, got {sizes}. Take the same text."
            )
        for corpus, layers in self.corpora.items():
            for own, more in zip(layers, sums[corpus], strict=True):
                if not torch.equal(own["num_tokens"], more.get("num_tokens", own["num_tokens"])):
                    raise ValueError(
                        f"`sums` of corpus '{corpus}' are of {int(more['num_tokens'])} tokens, these statistics of "
                        f"{int(own['num_tokens'])}. Take the same text."
                    )
        corpora = {
            corpus: tuple(
                LazyTensors(_sources(own) | _sources(more) | _sources({"num_tokens": own["num_tokens"]}))
                for own, more in zip(layers, sums[corpus], strict=True)
            )
            for corpus, layers in self.corpora.items()
        }
        return replace(self, corpora=corpora)

    @property
    def _tensors(self) -> LazyTensors:
        """Every tensor, under its name in the file."""
        places = {
            f"weights|{index}|{name}": partial(norms.__getitem__, name)
            for index, norms in enumerate(self.weights)
            for name in norms
        }
        places |= {
            f"corpus|{index}|{name}|{corpus}": partial(statistics.__getitem__, name)
            for corpus, layers in self.corpora.items()
            for index, statistics in enumerate(layers)
            for name in statistics
        }
        return LazyTensors(places)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over every number; the order of the corpora does not matter."""
        return digest_of_tensors(self._tensors)

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file."""
        record = {"kind": _KIND, "version": _VERSION, "shape": self.shape.to_dict(), "corpora": list(self.corpora)}
        write_tensors(path, self._tensors, metadata={"record": record})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Opens what `save` wrote: everything is checked, and a tensor takes memory only while it is used.

        The file stays open: `save` may replace it meanwhile, but nothing else should write into it.

        Raises:
            ValueError: the file is missing, broken, or holds something else; the message names the file.
        """
        tensors, metadata = open_tensors(path, what=f"file of {_KIND}")
        record = check_record(metadata, kind=_KIND, version=_VERSION, path=path)
        try:
            shape = ModelShape.from_dict(record["shape"])
            corpora = {str(corpus): tuple({} for _ in shape.layers) for corpus in record["corpora"]}
            weights = tuple({} for _ in shape.layers)
            for key in tensors:
                role, index, name, *corpus = key.split("|", maxsplit=3)
                target = corpora[corpus[0]] if role == "corpus" else weights
                target[_layer_index(index, layers=target, key=key)][name] = partial(tensors.__getitem__, key)
            return cls(
                shape=shape,
                corpora={corpus: tuple(map(LazyTensors, layers)) for corpus, layers in corpora.items()},
                weights=tuple(map(LazyTensors, weights)),
            )
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise ValueError(f"'{path}' does not hold valid {_KIND}: {error} Calibrate again.") from error


def _sources(tensors: Mapping[str, Tensor]) -> dict[str, Callable[[], Tensor]]:
    """What gives each tensor: none is read now."""
    return {name: partial(tensors.__getitem__, name) for name in tensors}


def _layer_index(index: str, *, layers: Sequence[object], key: str) -> int:
    if index not in map(str, range(len(layers))):
        raise ValueError(f"'{key}' must be of one of the layers 0 to {len(layers) - 1}, got {index!r}.")
    return int(index)


def _check_names(statistics: Mapping[str, Tensor], *, where: str) -> None:
    missing, unknown = sorted(REQUIRED - set(statistics)), sorted(set(statistics) - set(STATISTICS))
    if missing or unknown:
        raise ValueError(f"{where}: missing statistics {missing}, unknown statistics {unknown}.")


def add_layers(parts: Sequence[Layers]) -> Layers:
    """Adds statistics of the same layers: `max_*` by maximum, all others by sum; only names that all parts have."""
    totals = []
    for layers in zip(*parts, strict=True):
        common = [name for name in layers[0] if all(name in layer for layer in layers)]
        totals.append(LazyTensors({name: partial(_combine, name, layers=layers) for name in common}))
    return tuple(totals)


def _combine(name: str, *, layers: Layers) -> Tensor:
    total = layers[0][name].clone()
    for layer in layers[1:]:
        total = torch.maximum(total, layer[name]) if name.startswith("max_") else total + layer[name]
    return total


def check_record(metadata: Mapping[str, object], *, kind: str, version: int, path: str | Path) -> Mapping[str, Any]:
    """The description inside a file, when it is of the asked kind and version.

    Raises:
        ValueError: another kind of file, or another version.
    """
    record = metadata.get("record")
    if not isinstance(record, Mapping) or record.get("kind") != kind or record.get("version") != version:
        came = {key: record.get(key) for key in ("kind", "version")} if isinstance(record, Mapping) else record
        raise ValueError(f"'{path}' must hold {kind} of version {version}, got {came}.")
    return record
