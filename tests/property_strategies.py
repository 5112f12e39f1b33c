"""Hypothesis strategies of the core: shapes, statistics, plans and routings, and how many cases a property gets.

`PROPERTY_CASES=100 pytest -m property` tries a hundred times as many cases as CI, drawn anew at every run.
T tokens, K experts per token, E experts, C channels of a layer.
"""

import os
from collections.abc import Callable
from dataclasses import replace

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from statistics_factory import random_statistics
from torch import Tensor

from lightning_moe.records import STATISTICS, CalibrationStatistics, LayerShape, ModelShape, PrunePlan

FACTOR = int(os.environ.get("PROPERTY_CASES", "1"))
WIDTHS = (1, 3, 4, 7, 8, 8, 12, 16, 17, 32)
seeds = st.integers(0, 2**31 - 1)


def cases(number: int) -> Callable:
    """So many cases in CI, always the same ones; `PROPERTY_CASES` multiplies them."""
    return settings(
        max_examples=number * FACTOR,
        derandomize=FACTOR == 1,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )


def generator_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def needed_in_group(layer: LayerShape) -> int:
    """Experts that every router group must keep, counted from the words: any chosen groups hold top-k experts."""
    size = layer.num_experts // layer.num_groups
    needed = next(n for n in range(1, size + 1) if n * layer.top_k_groups >= layer.top_k)
    return needed if layer.num_groups == 1 else max(needed, min(2, size))


@st.composite
def layer_shapes(draw: st.DrawFn, *, name: str = "layers.0.experts", equal: bool | None = None) -> LayerShape:
    """K = 1 to K = E, with and without router groups, equal or ragged widths, experts that are gone already."""
    num_groups = draw(st.sampled_from((1, 1, 1, 2, 3)))
    size = draw(st.integers(1, 4 if num_groups > 1 else 7))
    top_k_groups = draw(st.integers(1, num_groups))
    num_experts = num_groups * size
    top_k = draw(st.integers(1, top_k_groups * size))
    if draw(st.booleans()) if equal is None else equal:
        widths = [draw(st.sampled_from(WIDTHS))] * num_experts
    else:
        widths = [draw(st.sampled_from(WIDTHS)) for _ in range(num_experts)]
    groups = {"num_groups": num_groups, "top_k_groups": top_k_groups}
    layer = LayerShape(name=name, widths=tuple(widths), top_k=top_k, **groups)
    spare = size - needed_in_group(layer)
    if not equal and spare and draw(st.booleans()):
        for group in range(num_groups):
            for gone in draw(st.sets(st.integers(0, size - 1), max_size=spare)):
                widths[group * size + gone] = 0
    return replace(layer, widths=tuple(widths))


@st.composite
def model_shapes(draw: st.DrawFn, *, equal: bool | None = None, max_layers: int = 3) -> ModelShape:
    """Up to three layers; `equal` gives all experts of the model one width."""
    names = [f"layers.{index}.experts" for index in range(draw(st.integers(1, max_layers)))]
    layers = [draw(layer_shapes(name=name, equal=equal)) for name in names]
    if equal:
        width = layers[0].widths[0]
        layers = [replace(layer, widths=(width,) * layer.num_experts) for layer in layers]
    return ModelShape(model_type="tiny", hidden_size=4, layers=tuple(layers), router_digest="")


@st.composite
def statistics(
    draw: st.DrawFn, *, shapes: st.SearchStrategy[ModelShape], ties: bool = True, max_corpora: int = 2
) -> CalibrationStatistics:
    """Random sums, Grams symmetric; with `ties` some experts may get no token, and scores may be a few numbers only."""
    shape = draw(shapes)
    names = ("text", "code")[: draw(st.integers(1, max_corpora))]
    made = random_statistics(shape, corpora=names, optional=True, seed=draw(seeds))
    for values in (layer for layers in made.corpora.values() for layer in layers):
        values["output_gram"] = values["output_gram"] @ values["output_gram"].T
    if not ties:
        return made
    coarse, corpora = draw(st.booleans()), {}
    for corpus, layers in made.corpora.items():
        idle = [draw(st.sets(st.integers(1, layer.num_experts), max_size=3)) for layer in shape.layers]
        corpora[corpus] = tuple(
            _starved(values, layer=layer, idle={e - 1 for e in gone}, coarse=coarse)
            for values, layer, gone in zip(layers, shape.layers, idle, strict=True)
        )
    return replace(made, corpora=corpora)


def _starved(values: dict[str, Tensor], *, layer: LayerShape, idle: set[int], coarse: bool) -> dict[str, Tensor]:
    """The sums of a layer some of whose experts got no token; one always has some."""
    used_E = torch.tensor([expert not in idle for expert in range(layer.num_experts)])
    if not float((values["count"] * used_E).sum()):
        used_E = torch.ones_like(used_E)
    used_C = used_E.repeat_interleave(torch.tensor(layer.widths))
    made = {}
    for name, value in values.items():
        dims = STATISTICS[name].dims
        masked = {"C": used_C, "E": used_E, "EH": used_E[:, None], "EE": used_E[:, None] & used_E}.get(dims)
        value = value if masked is None or name == "router_probability" else value * masked
        keeps_unit = dims == "" or name == "count"
        made[name] = value.clamp(-2, 2).trunc() if coarse and not keeps_unit else value
    made["count"][0 if not float(made["count"].sum()) else slice(0, 0)] = 1.0
    return made


@st.composite
def plans(draw: st.DrawFn, *, shapes: st.SearchStrategy[ModelShape] | None = None) -> PrunePlan:
    """Any legal plan: random channels of random experts, with those that a token needs."""
    shape = draw(model_shapes() if shapes is None else shapes)
    return plan_of(shape, seed=draw(seeds), share=draw(st.sampled_from((0.1, 0.5, 0.9, 1.0))))


def plan_of(shape: ModelShape, *, seed: int, share: float) -> PrunePlan:
    """Each expert may go, unless its group needs it; of the others about `share` of the channels stay, at least one."""
    generator = generator_of(seed)
    keep = []
    for layer in shape.layers:
        size, needed, parts = layer.num_experts // layer.num_groups, needed_in_group(layer), []
        for group in range(layer.num_groups):
            widths = layer.widths[group * size : (group + 1) * size]
            present = [e for e, width in enumerate(widths) if width]
            order = [present[i] for i in torch.randperm(len(present), generator=generator).tolist()]
            count = int(torch.randint(needed, len(present) + 1, (), generator=generator))
            for expert, width in enumerate(widths):
                kept = torch.rand(width, generator=generator) < share
                kept[torch.randint(width, (1,), generator=generator) if width else slice(0, 0)] = True
                parts.append(kept & (expert in order[:count]))
        keep.append(torch.cat(parts))
    return PrunePlan(shape=shape, method="random", prune_ratio=0.5, align=1, keep=tuple(keep), provenance={})
