"""Every method on random shapes, statistics and budgets: the budget exact, widths aligned, every token served."""

# E experts, C channels of a layer

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from property_strategies import cases, generator_of, model_shapes, needed_in_group, seeds, statistics
from torch import Tensor

from lightning_moe.allocation import PRESETS, ExpertMethod, PruningMethod, build_method
from lightning_moe.records import STATISTICS, CalibrationStatistics, LayerShape, ModelShape, PrunePlan

pytestmark = pytest.mark.property

SHAPES = model_shapes()
RATIOS = st.one_of(st.floats(0.0, 0.999), st.sampled_from((1e-9, 0.1, 0.25, 0.5, 0.75, 0.9, 1 - 1e-9)))
ALIGNS = st.sampled_from((1, 2, 3, 4, 8, 16))
EXPERT_METHODS = [name for name in PRESETS if issubclass(PRESETS[name].method, ExpertMethod)]
RANKINGS = [name for name in PRESETS if name not in (*EXPERT_METHODS, "paper_a", "uniform")]
PROTECTING = ("exact_global", "channel_coverage")


def groups(values: Sequence[int], *, layer: LayerShape) -> list[Sequence[int]]:
    size = layer.num_experts // layer.num_groups
    return [values[first : first + size] for first in range(0, layer.num_experts, size)]


def assert_served(plan: PrunePlan) -> None:
    """Whichever groups a router chooses, they hold top-k experts; one that ranks groups by two has them."""
    for index, layer in enumerate(plan.shape.layers):
        alive = [sum(map(bool, group)) for group in groups(plan.widths(index), layer=layer)]
        assert all(sum(chosen) >= layer.top_k for chosen in combinations(alive, layer.top_k_groups))
        assert layer.num_groups == 1 or min(alive) >= min(2, layer.num_experts // layer.num_groups)


def assert_aligned(plan: PrunePlan, *, num_kept: int, align: int, min_width: int = 0) -> None:
    assert plan.num_kept == num_kept
    for index, layer in enumerate(plan.shape.layers):
        for kept, width in zip(plan.widths(index), layer.widths, strict=True):
            assert kept % align == 0
            assert kept == 0 or kept >= min(min_width, width // align * align)


def block_budget(shape: ModelShape, *, ratio: float, align: int) -> int:
    return round((1 - ratio) * shape.num_channels) // align


def num_needed(shape: ModelShape) -> int:
    return sum(needed_in_group(layer) * layer.num_groups for layer in shape.layers)


def is_possible(shape: ModelShape, *, ratio: float, align: int) -> bool:
    """Whether some plan of whole blocks has exactly this budget and serves every token."""
    whole = sum(width // align for layer in shape.layers for width in layer.widths)
    have_blocks = all(
        sum(width >= align for width in group) >= needed_in_group(layer)
        for layer in shape.layers
        for group in groups(layer.widths, layer=layer)
    )
    return have_blocks and num_needed(shape) <= block_budget(shape, ratio=ratio, align=align) <= whole


@pytest.mark.parametrize("name", RANKINGS)
@given(made=statistics(shapes=SHAPES), ratio=RATIOS, align=ALIGNS)
@cases(25)
def test_a_ranking_spends_its_budget_wherever_that_is_possible(name, made, ratio, align):
    free = {"protect_super_experts": False} if name in PROTECTING else {}
    method, shape = build_method(name, align=align, **free), made.shape
    if ratio and not is_possible(shape, ratio=ratio, align=align):
        with pytest.raises(ValueError, match="`align`"):
            method.plan(made, prune_ratio=ratio)
        return
    plan = method.plan(made, prune_ratio=ratio)
    assert_served(plan)
    if ratio:
        assert_aligned(plan, num_kept=align * block_budget(shape, ratio=ratio, align=align), align=align)
    else:
        assert plan.num_kept == shape.num_channels


def plan_or_refusal(method: PruningMethod, made: CalibrationStatistics, *, ratio: float) -> PrunePlan | str:
    try:
        return method.plan(made, prune_ratio=ratio)
    except ValueError as error:
        return str(error)


@given(made=statistics(shapes=SHAPES), ratio=RATIOS, align=ALIGNS, min_width=st.sampled_from((1, 4, 8, 16)))
@cases(150)
def test_paper_a_keeps_its_promises_or_refuses(made, ratio, align, min_width):
    method, shape = build_method("paper_a", align=align, min_width=min_width, protect_super_experts=False), made.shape
    plan = plan_or_refusal(method, made, ratio=ratio)
    if isinstance(plan, str):
        # Blocks of one width above `align` may not fill a layer's budget; blocks of `align` always do.
        assert min_width > align or not is_possible(shape, ratio=ratio, align=align)
        return
    assert_served(plan)
    if ratio:
        num_kept = align * block_budget(shape, ratio=ratio, align=align)
        assert_aligned(plan, num_kept=num_kept, align=align, min_width=-(-min_width // align) * align)


@given(made=statistics(shapes=model_shapes(equal=True)), ratio=RATIOS, align=ALIGNS)
@cases(60)
def test_one_width_is_the_nearest_whole_number_of_blocks(made, ratio, align):
    width = made.shape.layers[0].widths[0]
    if ratio and align > width:
        with pytest.raises(ValueError, match="is wider than the experts"):
            build_method("uniform", align=align).plan(made, prune_ratio=ratio)
        return
    plan = build_method("uniform", align=align).plan(made, prune_ratio=ratio)
    kept = {own for index in range(len(plan.keep)) for own in plan.widths(index)}
    assert len(kept) == 1
    possible = [width] if ratio == 0 else range(align, width + 1, align)
    assert min(abs(other - (1 - ratio) * width) for other in possible) == pytest.approx(
        abs(kept.pop() - (1 - ratio) * width)
    )


@pytest.mark.parametrize("name", EXPERT_METHODS)
@given(made=statistics(shapes=SHAPES), ratio=RATIOS)
@cases(15)
def test_whole_experts_go_to_the_nearest_count(name, made, ratio):
    method = build_method(name)
    present = [[width for width in layer.widths if width] for layer in made.shape.layers]
    even = all(len(set(own)) == 1 for own in present)
    plan = plan_or_refusal(method, made, ratio=ratio)
    if isinstance(plan, str):
        needed = [needed_in_group(layer) * layer.num_groups for layer in made.shape.layers]
        assert not even or any(round((1 - ratio) * len(a)) < b for a, b in zip(present, needed, strict=True))
        return
    assert_served(plan)
    for index, (layer, own) in enumerate(zip(made.shape.layers, present, strict=True)):
        kept = plan.widths(index)
        assert all(stays in (0, width) for stays, width in zip(kept, layer.widths, strict=True))
        if even or ratio == 0:
            assert sum(map(bool, kept)) == round((1 - ratio) * len(own))


def turn_around(made: CalibrationStatistics, *, seed: int) -> tuple[CalibrationStatistics, list[Tensor]]:
    """The same model with experts in another order inside each router group, and channels inside each expert."""
    generator, orders, layers = generator_of(seed), [], []
    for layer in made.shape.layers:
        within = groups(range(layer.num_experts), layer=layer)
        order_E = [group[i] for group in within for i in torch.randperm(len(group), generator=generator).tolist()]
        parts = [
            layer.offsets[expert] + torch.randperm(layer.widths[expert], generator=generator) for expert in order_E
        ]
        orders.append({"E": torch.tensor(order_E), "C": torch.cat(parts)})
        layers.append(replace(layer, widths=tuple(layer.widths[expert] for expert in order_E)))

    def turn(values, order):
        turned = {}
        for name, value in values.items():
            dims = STATISTICS[name].dims if name in STATISTICS else "C"
            for dim, letter in enumerate(dims):
                value = value.index_select(dim, order[letter]) if letter in order else value
            turned[name] = value
        return turned

    def turn_layers(values):
        return tuple(turn(own, order) for own, order in zip(values, orders, strict=True))

    shape = replace(made.shape, layers=tuple(layers))
    corpora = {name: turn_layers(values) for name, values in made.corpora.items()}
    turned = CalibrationStatistics(shape=shape, corpora=corpora, weights=turn_layers(made.weights))
    return turned, [order["C"] for order in orders]


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "random"])
@given(made=statistics(shapes=model_shapes(), ties=False, max_corpora=1), ratio=RATIOS, seed=seeds)
@cases(10)
def test_permuted_experts_and_channels_give_the_permuted_plan(name, made, ratio, seed):
    """Experts move inside their router group, channels inside their expert."""
    turned, orders = turn_around(made, seed=seed)
    method = build_method(name)
    plan, again = (plan_or_refusal(method, one, ratio=ratio) for one in (made, turned))
    if isinstance(plan, str) or isinstance(again, str):
        assert isinstance(plan, str) == isinstance(again, str)
        return
    for keep_C, turned_C, order_C in zip(plan.keep, again.keep, orders, strict=True):
        assert torch.equal(turned_C, keep_C[order_C])
