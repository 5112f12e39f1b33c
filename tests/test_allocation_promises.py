"""What every method promises, whatever it decides by."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from statistics_factory import make_statistics

from lightning_moe.allocation import (
    PRESETS,
    ChannelCoverage,
    ChannelRanking,
    ExactGlobal,
    ExpertDropping,
    PaperA,
    TBCoverage,
    UniformWidth,
    build_method,
)
from lightning_moe.criteria import CHANNEL_CRITERIA, EXPERT_CRITERIA
from lightning_moe.records import PrunePlan

full_statistics = partial(make_statistics, optional=True)
GROUPED = {"num_experts": 16, "top_k": 4, "num_groups": 4, "top_k_groups": 2}


def permuted(statistics, *, order_E, order_C):
    """The same model with its experts and channels in another order."""
    orders = {len(order_E): order_E, len(order_C): order_C}

    def turn(values):
        turned = {
            name: value[orders[len(value)]] if name != "entropy_histogram" and value.dim() else value
            for name, value in values.items()
        }
        return turned | ({"output_gram": turned["output_gram"][:, order_E]} if "output_gram" in turned else {})

    corpora = {corpus: tuple(turn(layer) for layer in layers) for corpus, layers in statistics.corpora.items()}
    return replace(statistics, corpora=corpora, weights=tuple(turn(layer) for layer in statistics.weights))


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("prune_ratio", [0.0, 0.5])
def test_a_plan_can_be_made_again_from_its_provenance(name, prune_ratio):
    statistics = full_statistics(corpora=("b", "a"), num_experts=16)
    plan = build_method(name).plan(statistics, prune_ratio=prune_ratio)
    again = build_method(plan.method, **json.loads(plan.provenance["settings"]))
    assert again.plan(statistics, prune_ratio=prune_ratio, corpora=["b", "a"]).digest == plan.digest
    assert plan.provenance["corpora"] == "b, a"


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("shape", [{}, GROUPED, {"width": 33}])
def test_ratio_zero_is_the_identity(name, shape):
    plan = build_method(name).plan(full_statistics(**shape), prune_ratio=0.0)
    assert plan.num_kept == plan.shape.num_channels
    assert plan.achieved_prune_ratio == 0.0
    assert plan.evicted(0) == ()


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("prune_ratio", [1.0, -0.01, 2, float("nan"), "0.5"])
def test_ratio_out_of_range_is_refused(name, prune_ratio):
    with pytest.raises(ValueError, match=r"`prune_ratio` must be in \[0, 1\), got"):
        build_method(name).plan(full_statistics(), prune_ratio=prune_ratio)


@pytest.mark.parametrize("shape", [{"num_experts": 16}, GROUPED, {"num_experts": 16, "width": 48, "num_layers": 5}])
@pytest.mark.parametrize("prune_ratio", [0.01, 0.2, 0.25, 0.4, 0.5, 0.6])
@pytest.mark.parametrize(
    "method",
    [
        ExactGlobal(),
        ExactGlobal(align=1),
        PaperA(),
        PaperA(align=8, min_width=16),
        ChannelCoverage(),
        ChannelCoverage(align=4, protected_share=1.0),
        *(ChannelRanking(layers=layers) for layers in ("global", "uniform", "u_shaped", "loss_proportional")),
    ],
)
def test_budget_is_exact_and_widths_aligned(method, prune_ratio, shape):
    statistics = full_statistics(**shape, corpora=("a", "b"))
    plan = method.plan(statistics, prune_ratio=prune_ratio)
    total = statistics.shape.num_channels
    assert plan.align == (method.align or 16)
    assert plan.num_kept == round((1 - prune_ratio) * total) // plan.align * plan.align
    assert all(width % plan.align == 0 for index in range(len(plan.keep)) for width in plan.widths(index))


@pytest.mark.parametrize("criterion", CHANNEL_CRITERIA)
@pytest.mark.parametrize("method", [ExactGlobal, PaperA, UniformWidth, ChannelCoverage, ChannelRanking])
def test_every_channel_criterion_plans(method, criterion):
    plan = method(criterion=criterion).plan(full_statistics(num_experts=16), prune_ratio=0.5)
    assert plan.num_kept == plan.shape.num_channels // 2


@pytest.mark.parametrize("criterion", EXPERT_CRITERIA)
def test_every_expert_criterion_plans(criterion):
    statistics = full_statistics(num_experts=16)
    for method in (
        ExpertDropping(criterion=criterion),
        TBCoverage(utility=criterion),
        PaperA(expert_weight=criterion),
    ):
        assert method.plan(statistics, prune_ratio=0.5).num_kept == statistics.shape.num_channels // 2


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "random"])
@pytest.mark.parametrize("seed", range(3))
def test_permuted_experts_and_channels_give_the_permuted_plan(name, seed):
    statistics = full_statistics(num_layers=3, num_experts=16, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    order_E, inner = torch.randperm(16, generator=generator), torch.randperm(32, generator=generator)
    order_C = (order_E[:, None] * 32 + inner).flatten()
    method = build_method(name)
    before = method.plan(statistics, prune_ratio=0.55)
    after = method.plan(permuted(statistics, order_E=order_E, order_C=order_C), prune_ratio=0.55)
    for keep_C, turned_C in zip(before.keep, after.keep, strict=True):
        assert torch.equal(turned_C, keep_C[order_C])


# CAMERA adds a sum to a maximum, so longer text weighs its sum more.
@pytest.mark.parametrize("name", [name for name in PRESETS if name != "camera"])
def test_the_unit_of_the_statistics_does_not_matter(name):
    # A corpus twice as long, or under two names, gives the same plan: sums double, maxima stay.
    statistics = full_statistics(num_experts=16)
    twice = replace(statistics, corpora={"a": statistics.corpora["text"], "b": statistics.corpora["text"]})
    method = build_method(name)
    assert method.plan(twice, prune_ratio=0.5).digest == method.plan(statistics, prune_ratio=0.5).digest


@pytest.mark.parametrize("name", PRESETS)
def test_plan_survives_the_disk(name, tmp_path):
    plan = build_method(name).plan(full_statistics(), prune_ratio=0.5)
    plan.save(tmp_path / "plan.json")
    assert PrunePlan.load(tmp_path / "plan.json").digest == plan.digest


@pytest.mark.parametrize("name", PRESETS)
def test_impossible_ratio_names_a_layer(name):
    # top_k = 8 of 8 experts: at least one block of 16 of 32 channels each.
    statistics = full_statistics(num_experts=8, top_k=8)
    if name == "uniform":
        assert build_method(name).plan(statistics, prune_ratio=0.9).achieved_prune_ratio == 0.5
        return
    with pytest.raises(ValueError, match=r"model.layers.[01].mlp.experts.* 8 "):
        build_method(name).plan(statistics, prune_ratio=0.9)
