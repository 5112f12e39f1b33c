"""Budgets in bytes, parameters and active share on random statistics: kept, and one block more would break them."""

import json
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from property_strategies import cases, seeds
from statistics_factory import make_shape, random_statistics
from tiny_models import tiny_model

from lightning_moe.allocation import ExactGlobal, PruningMethod, build_method
from lightning_moe.allocation.budgets import Budget, BudgetPlan, spend_budget
from lightning_moe.allocation.meter import Meter
from lightning_moe.quantization.size import ModelSizes, sizes_of
from lightning_moe.records import CalibrationStatistics
from lightning_moe.surgery.schedule import GradualSchedule, PruneSchedule

pytestmark = pytest.mark.property

WIDTHS = st.lists(st.sampled_from((3, 8, 16, 17, 32)), min_size=8, max_size=8)


@cache
def sizes(bits: int) -> ModelSizes:
    return sizes_of(tiny_model().config, bits=bits, dtype=torch.bfloat16)


def limit_between(least: float, most: float, share: float) -> int:
    return max(1, round(least + share * (most - least)))


@given(
    widths=WIDTHS,
    seed=seeds,
    top_k=st.integers(1, 8),
    bits=st.sampled_from((4, 16)),
    name=st.sampled_from(("bytes", "stored_params")),
    share=st.floats(0.0, 1.1),
    align=st.sampled_from((1, 4, 8)),
)
@cases(60)
def test_a_limit_is_kept_and_one_block_more_would_break_it(widths, seed, top_k, bits, name, share, align):
    made = random_statistics(make_shape(width=widths, top_k=top_k), seed=seed)
    meter = Meter.of(made, sizes=sizes(bits), corpora=None)
    least, whole = (meter.measure(name, own) for own in (meter.least(align=align), meter.whole))
    if any(sum(width >= align for width in layer.widths) < top_k for layer in made.shape.layers):
        return
    limit = limit_between(least, whole, share)
    method = ExactGlobal(align=align, protect_super_experts=False)
    spent = spend_budget(method, made, budget=Budget(**{name: limit}), sizes=sizes(bits), progress=False)
    reached = meter.measure(name, [spent.plan.widths(index) for index in range(2)])
    assert reached <= limit
    assert spent.reached[name] == reached
    if limit >= whole:
        assert spent.plan.num_kept == made.shape.num_channels
        assert spent.binding == ()
        return
    assert spent.binding == (name,)
    ratio = json.loads(spent.plan.provenance["budget"])["method_ratio"]
    again = method.plan(made, prune_ratio=ratio)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(again.keep, spent.plan.keep, strict=True))
    blocks = spent.plan.num_kept // align + 1
    if blocks * align <= sum(width // align * align for layer in made.shape.layers for width in layer.widths):
        larger = method.plan(made, prune_ratio=max(0.0, 1 - blocks * align / made.shape.num_channels))
        assert meter.measure(name, [larger.widths(index) for index in range(2)]) > limit


def spent_or_refusal(method: PruningMethod, made: CalibrationStatistics, *, budget: Budget) -> BudgetPlan | str:
    try:
        return spend_budget(method, made, budget=budget, progress=False)
    except ValueError as error:
        return str(error)


@given(widths=WIDTHS, seed=seeds, top_k=st.integers(1, 4), active=st.floats(0.05, 1.0), keep=st.floats(0.3, 1.0))
@pytest.mark.parametrize("name", ["exact_global", "paper_a", "reap", "channel_coverage"])
@cases(15)
def test_several_limits_hold_together_or_are_refused(name, widths, seed, top_k, active, keep):
    made = random_statistics(make_shape(width=widths, top_k=top_k), seed=seed)
    settings = {} if name == "reap" else {"align": 1}
    budget = Budget(active=active, keep_ratio=keep)
    spent = spent_or_refusal(build_method(name, **settings), made, budget=budget)
    if isinstance(spent, str):
        assert "keeps" in spent
        return
    assert spent.reached["active"] <= active * (1 + 1e-9)
    assert spent.reached["keep_ratio"] <= keep * (1 + 1e-9)
    assert spent.reached["keep_ratio"] == pytest.approx(spent.plan.num_kept / made.shape.num_channels)


@given(
    shape=st.sampled_from(("linear", "cubic")),
    begin=st.integers(0, 50),
    length=st.integers(1, 400),
    num_cuts=st.integers(1, 40),
    ratio=st.floats(0.01, 0.99),
)
@cases(150)
def test_a_curve_climbs_to_its_ratio_and_every_cut_is_due_once(shape, begin, length, num_cuts, ratio):
    num_cuts = min(num_cuts, length)
    curve = GradualSchedule(shape=shape, begin=begin, end=begin + length, num_cuts=num_cuts, prune_ratio=ratio)
    schedule = curve.to_cuts()
    steps, ratios = zip(*schedule.cuts, strict=True)
    assert len(steps) == num_cuts
    assert begin < steps[0]
    assert (steps[-1], ratios[-1]) == (begin + length, ratio)
    for step, reached in schedule.cuts:
        share = (step - begin) / length
        assert reached == pytest.approx(ratio * (share if shape == "linear" else 1 - (1 - share) ** 3))
    done, seen = 0, []
    for step in range(begin + length + 3):
        due = PruneSchedule(cuts=schedule.cuts).due(step=step, num_done=done)
        if due is not None:
            done, reached = due
            seen.append((step, reached))
    assert tuple(seen) == schedule.cuts
