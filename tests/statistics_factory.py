"""Random but valid calibration statistics of any shape, for tests that need some."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lightning_moe.files import read_tensors, write_tensors
from lightning_moe.records import STATISTICS, CalibrationStatistics, LayerShape, ModelShape, PrunePlan
from lightning_moe.records.statistics import WEIGHT_ABS_SUMS, WEIGHT_NORMS


def make_shape(
    *,
    num_layers: int = 2,
    num_experts: int = 8,
    width: int | Sequence[int] = 32,
    hidden: int = 64,
    top_k: int = 2,
    num_groups: int = 1,
    top_k_groups: int = 1,
    model_type: str = "qwen3_moe",
) -> ModelShape:
    """`width` is one number for all experts, or one per expert (the same in every layer)."""
    widths = (width,) * num_experts if isinstance(width, int) else tuple(width)
    layers = tuple(
        LayerShape(
            name=f"model.layers.{index}.mlp.experts",
            widths=widths,
            top_k=top_k,
            num_groups=num_groups,
            top_k_groups=top_k_groups,
        )
        for index in range(num_layers)
    )
    digest = hashlib.sha256(b"routers").hexdigest()
    return ModelShape(model_type=model_type, hidden_size=hidden, layers=layers, router_digest=digest)


def make_statistics(
    *,
    num_layers: int = 2,
    num_experts: int = 8,
    width: int | Sequence[int] = 32,
    hidden: int = 64,
    top_k: int = 2,
    num_groups: int = 1,
    top_k_groups: int = 1,
    corpora: Sequence[str] = ("text",),
    num_tokens: int = 1000,
    optional: bool = False,
    seed: int = 0,
) -> CalibrationStatistics:
    """Statistics with every required sum (and those of moments and gradients when `optional`), positive and uneven."""
    shape = make_shape(
        num_layers=num_layers,
        num_experts=num_experts,
        width=width,
        hidden=hidden,
        top_k=top_k,
        num_groups=num_groups,
        top_k_groups=top_k_groups,
    )
    return random_statistics(shape, corpora=corpora, num_tokens=num_tokens, optional=optional, seed=seed)


def random_statistics(
    shape: ModelShape,
    *,
    corpora: Sequence[str] = ("text",),
    num_tokens: int = 1000,
    optional: bool = False,
    seed: int = 0,
) -> CalibrationStatistics:
    """The same for a shape that is there already."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"hidden": shape.hidden_size, "num_tokens": num_tokens}
    made = {
        corpus: tuple(
            _layer_statistics(layer, **sizes, optional=optional, generator=generator) for layer in shape.layers
        )
        for corpus in corpora
    }
    weights = tuple(
        {name: _uneven((layer.num_channels,), generator=generator) for name in (*WEIGHT_NORMS, *WEIGHT_ABS_SUMS)}
        for layer in shape.layers
    )
    return CalibrationStatistics(shape=shape, corpora=made, weights=weights)


def shape_of(*widths: Sequence[int], top_k: int = 1, num_groups: int = 1, top_k_groups: int = 1) -> ModelShape:
    """One layer per argument, with these expert widths: for tiny examples worked by hand."""
    layers = tuple(
        LayerShape(
            name=f"layers.{index}.experts",
            widths=tuple(own),
            top_k=top_k,
            num_groups=num_groups,
            top_k_groups=top_k_groups,
        )
        for index, own in enumerate(widths)
    )
    return ModelShape(model_type="tiny", hidden_size=4, layers=layers, router_digest="")


def hand_statistics(
    shape: ModelShape, *, layers: Sequence[dict[str, Sequence[float]]], num_tokens: int = 10
) -> CalibrationStatistics:
    """Statistics that are 1 everywhere except where `layers` (one mapping per layer) gives numbers.

    Optional ones are there where `layers` gives them; sums of absolute weights are.
    """
    norms = (*WEIGHT_NORMS, *WEIGHT_ABS_SUMS)
    made, weights = [], []
    for layer, given in zip(shape.layers, layers, strict=True):
        sizes = {
            name: statistic.size(layer, hidden_size=shape.hidden_size)
            for name, statistic in STATISTICS.items()
            if not statistic.optional
        }
        values = {name: torch.ones(size, dtype=torch.float64) for name, size in sizes.items()}
        values["num_tokens"] = torch.tensor(float(num_tokens), dtype=torch.float64)
        norm = {name: torch.ones(layer.num_channels, dtype=torch.float64) for name in norms}
        for name, numbers in given.items():
            (norm if name in norms else values)[name] = torch.tensor(numbers, dtype=torch.float64)
        made.append(values)
        weights.append(norm)
    return CalibrationStatistics(shape=shape, corpora={"text": tuple(made)}, weights=tuple(weights))


def make_plan(shape: ModelShape, *, keep: tuple[Tensor, ...] | None = None, **fields) -> PrunePlan:
    """A plan that keeps every second channel, unless `keep` says otherwise."""
    if keep is None:
        keep = tuple(torch.arange(layer.num_channels) % 2 == 0 for layer in shape.layers)
    values = {"method": "by_hand", "prune_ratio": 0.5, "align": 1, "provenance": {"criterion": "none"}} | fields
    return PrunePlan(shape=shape, keep=keep, **values)


def rewrite(path: Path, *, tensors: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None, **fields) -> None:
    """Writes a safetensors file of ours again with some fields of its description, or its tensors, exchanged."""
    own, metadata = read_tensors(path, what="file")
    write_tensors(path, tensors(own) if tensors else own, metadata={"record": metadata["record"] | fields})


def _uneven(size: tuple[int, ...], *, generator: torch.Generator) -> Tensor:
    return torch.randn(size, generator=generator, dtype=torch.float64).exp()


def _layer_statistics(
    layer: LayerShape, *, hidden: int, num_tokens: int, optional: bool, generator: torch.Generator
) -> dict[str, Tensor]:
    values = {
        name: _uneven(statistic.size(layer, hidden_size=hidden), generator=generator)
        for name, statistic in STATISTICS.items()
        if optional or not statistic.optional
    }
    share_E = values["count"] / values["count"].sum()
    values["num_tokens"] = torch.tensor(float(num_tokens), dtype=torch.float64)
    values["count"] = (share_E * num_tokens * layer.top_k).round()
    # A few experts hurt: their first-order attribution is negative.
    sign_E = torch.where(torch.rand(layer.num_experts, generator=generator) < 0.2, -1.0, 1.0)
    values["attribution"] = values["attribution"] * sign_E
    return values
