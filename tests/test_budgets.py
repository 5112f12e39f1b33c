"""Budgets: what they mean, that they are met to a block per layer, and what is said where they cannot be."""

import json
from dataclasses import replace

import pytest
import torch
from statistics_factory import hand_statistics, make_statistics, shape_of
from tiny_models import tiny_model

from lightning_moe.allocation import ExactGlobal, PaperA, build_method
from lightning_moe.allocation.budgets import Budget, spend_budget
from lightning_moe.allocation.meter import Meter
from lightning_moe.allocation.units import format_bytes, format_params, parse_bytes, parse_params
from lightning_moe.allocation.usage import active_channels, rerouted, usage_costs, usage_shares
from lightning_moe.models.discovery import model_shape
from lightning_moe.quantization.size import sizes_of

# Two experts of two channels in each of two layers, ten tokens, one expert a token.
SHAPE = shape_of([2, 2], [2, 2])
SCORES = {"channel_ablation": [8.0, 4.0, 3.0, 1.0]}, {"channel_ablation": [6.0, 5.0, 2.0, 0.5]}
COUNTS = {"count": [8.0, 2.0]}, {"count": [5.0, 5.0]}
HAND = hand_statistics(SHAPE, layers=[score | count for score, count in zip(SCORES, COUNTS, strict=True)])


def kept(plan):
    return [keep_C.nonzero().flatten().tolist() for keep_C in plan.keep]


def widths_of(plan):
    return [plan.widths(index) for index in range(len(plan.shape.layers))]


def exact(**settings):
    return ExactGlobal(align=1, protect_super_experts=False, **settings)


def tiny_sizes_and_statistics(bits=4, **settings):
    model = tiny_model(dtype=torch.bfloat16)
    layers = model_shape(model)
    statistics = make_statistics(num_layers=2, num_experts=8, width=32, hidden=64, top_k=2, **settings)
    assert [layer.widths for layer in layers.layers] == [layer.widths for layer in statistics.shape.layers]
    return sizes_of(model.config, bits=bits), statistics


def test_costs_by_hand():
    # Usage 0.8 and 0.2, 0.5 and 0.5; the mean over eight channels is (1.6 + 0.4 + 1 + 1) / 8 = 0.5.
    usage = usage_shares(HAND)
    assert [share_E.tolist() for share_E in usage] == [[0.8, 0.2], [0.5, 0.5]]
    first, second = usage_costs(SHAPE, usage=usage, usage_weight=1.0)
    assert first.tolist() == pytest.approx([1.6, 0.4])
    assert second.tolist() == pytest.approx([1.0, 1.0])
    first, second = usage_costs(SHAPE, usage=usage, usage_weight=0.5)
    assert first.tolist() == pytest.approx([1.3, 0.7])
    first, _ = usage_costs(SHAPE, usage=usage, usage_weight=0.0)
    assert first.tolist() == [1.0, 1.0]


def test_ranking_over_cost_by_hand():
    # Weight 0: the best four of 8 6 5 4 3 2 1 0.5. Weight 1: 8/1.6 = 5, 4/1.6 = 2.5, 3/0.4 = 7.5, 1/0.4 = 2.5 beside
    # 6, 5, 2, 0.5: the best are 7.5, 6, and 5 and 5.
    assert kept(exact().plan(HAND, prune_ratio=0.5)) == [[0, 1], [0, 1]]
    assert kept(exact(usage_weight=0.0).plan(HAND, prune_ratio=0.5)) == [[0, 1], [0, 1]]
    assert kept(exact(usage_weight=1.0).plan(HAND, prune_ratio=0.5)) == [[0, 2], [0, 1]]


def test_an_unused_expert_costs_nothing_and_goes_first_all_the_same():
    unused = [{**SCORES[0], "count": [10.0, 0.0], "channel_ablation": [8.0, 4.0, 0.0, 0.0]}, SCORES[1] | COUNTS[1]]
    plan = exact(usage_weight=1.0).plan(hand_statistics(SHAPE, layers=unused), prune_ratio=0.25)
    assert kept(plan)[0] == [0, 1]


def test_tokens_of_experts_that_are_gone_go_to_the_others():
    # Layer 0: expert 1 (0.2) is gone, expert 0 takes all tokens. Layer 1 as it was.
    usage = rerouted(usage_shares(HAND), widths=[[1, 0], [2, 1]], before=[[2, 2], [2, 2]])
    assert [share_E.tolist() for share_E in usage] == [[1.0, 0.0], [0.5, 0.5]]
    assert active_channels([[1, 0], [2, 1]], usage=usage) == pytest.approx(1 + 1.5)
    nobody = [torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)]
    assert rerouted(nobody, widths=[[0, 3, 3]], before=[[3, 3, 3]])[0].tolist() == [0.0, 0.5, 0.5]
    # Expert 2 is masked: nobody used it, and nobody will.
    assert rerouted(nobody, widths=[[0, 3, 0]], before=[[3, 3, 0]])[0].tolist() == [0.0, 1.0, 0.0]


def test_novices_keep_their_tokens():
    # Expert 2 is a novice, half of the tokens go to it: a token uses 0.3 * 2 + 0.2 * 2 channels.
    layers = [{"count": [3.0, 2.0, 5.0], "channel_ablation": [4.0, 3.0, 2.0, 1.0]}]
    statistics = hand_statistics(shape_of([2, 2, 0]), layers=layers)
    meter = Meter.of(statistics, sizes=None, corpora=None)
    assert meter.measure("active", meter.whole) == 1.0
    # With expert 1 gone expert 0 and the novice share its tokens: 0.3 / 0.8 * 2 of 1.
    assert meter.measure("active", [[2, 0, 0]]) == pytest.approx(0.75)
    spent = spend_budget(exact(), statistics, budget=Budget(active=0.75))
    assert spent.before["active"] == 1.0
    assert (widths_of(spent.plan), spent.reached["active"]) == ([(2, 0, 0)], pytest.approx(0.75))


def test_a_budget_of_active_parameters_by_hand():
    # Dense: a token uses 2 + 2 channels. Score over cost, best first: channel 2 of layer 0 (7.5), 0 of layer 1 (6),
    # 0 of layer 0 (5), 1 of layer 1 (5), 1 and 3 of layer 0 (2.5), 2 and 3 of layer 1 (2, 0.5).
    # Three stay: 0.8 + 0.2, and 1 in layer 1, whose only expert left takes all tokens: 2 of 4. Four: 3 of 4. Seven:
    # 2 in layer 0, 0.5 * 2 + 0.5 * 1 in layer 1, where fewer tokens use the wide expert now: 3.5 of 4.
    for active, channels, reached in ((0.5, 3, 0.5), (0.74, 3, 0.5), (0.75, 4, 0.75), (0.9, 7, 0.875)):
        spent = spend_budget(exact(), HAND, budget=Budget(active=active))
        assert spent.plan.num_kept == channels
        assert spent.reached["active"] == pytest.approx(reached)
        assert spent.binding == ("active",)
    assert '"usage_weight": 1.0' in spent.plan.provenance["settings"]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("share", [0.35, 0.6, 0.85])
def test_stored_budgets_are_met_to_one_block(seed, bits, share):
    sizes, statistics = tiny_sizes_and_statistics(bits, seed=seed)
    method = ExactGlobal(align=4)
    block = 4 * sizes.channel_params
    least, most = sizes.stored_params([[4, 4] + [0] * 6] * 2), sizes.stored_params(sizes.dense)
    wanted = int(least + share * (most - least))
    spent = spend_budget(method, statistics, budget=Budget(stored_params=wanted), sizes=sizes)
    assert wanted - 2 * (block + 64) < sizes.stored_params(widths_of(spent.plan)) <= wanted
    assert spent.reached["stored_params"] == sizes.stored_params(widths_of(spent.plan))
    budget = Budget(bytes=sizes.num_bytes(widths_of(spent.plan)))
    again = spend_budget(method, statistics, budget=budget, sizes=sizes)
    assert again.reached["bytes"] <= budget.bytes
    assert abs(again.plan.num_kept - spent.plan.num_kept) <= 4
    assert again.binding == ("bytes",)


@pytest.mark.parametrize("name", ["exact_global", "paper_a", "channel_coverage", "camera"])
@pytest.mark.parametrize("active", [0.4, 0.7, 0.9])
def test_active_budgets_are_met_by_every_channel_method(name, active):
    statistics = make_statistics(num_layers=3, num_experts=8, width=64, seed=5)
    method = build_method(name, align=8)
    spent = spend_budget(method, statistics, budget=Budget(active=active))
    assert spent.reached["active"] <= active
    assert spent.binding == ("active",)
    if name == "exact_global":
        # One block more in each layer, in experts of average use: 8 of 8 * 64 channels.
        assert spent.reached["active"] > active - 8 / (8 * 64)


def test_two_budgets_take_the_smallest_weight_that_meets_both():
    statistics = make_statistics(num_layers=3, num_experts=8, width=64, seed=2)
    method = ExactGlobal(align=8)
    stored = spend_budget(method, statistics, budget=Budget(keep_ratio=0.5, active=1.0))
    assert '"usage_weight": 0.0' in stored.plan.provenance["settings"]
    assert stored.binding == ("keep_ratio",)
    tightest = ExactGlobal(align=8, usage_weight=1.0).plan(statistics, prune_ratio=0.5)
    active = (stored.reached["active"] + active_share(tightest, statistics)) / 2
    both = spend_budget(method, statistics, budget=Budget(keep_ratio=0.5, active=active))
    weight = json.loads(both.plan.provenance["settings"])["usage_weight"]
    assert 0 < weight < 1
    assert both.reached["keep_ratio"] == pytest.approx(0.5, abs=1e-9)
    assert active - 3 * 8 / (3 * 8 * 64) < both.reached["active"] <= active
    assert both.binding == ("keep_ratio", "active")
    # A step less and the active budget is broken.
    less = replace(method, usage_weight=weight - 0.05).plan(statistics, prune_ratio=0.5)
    assert active_share(less, statistics) > active
    only_active = spend_budget(method, statistics, budget=Budget(keep_ratio=0.9, active=0.3))
    assert only_active.binding == ("active",)
    assert json.loads(only_active.plan.provenance["settings"])["usage_weight"] == 1.0


def active_share(plan, statistics):
    widths, usage = widths_of(plan), usage_shares(statistics)
    whole = active_channels([layer.widths for layer in plan.shape.layers], usage=usage)
    before = [layer.widths for layer in plan.shape.layers]
    return active_channels(widths, usage=rerouted(usage, widths=widths, before=before)) / whole


def test_a_weight_that_is_set_stays():
    statistics = make_statistics(num_layers=3, num_experts=8, width=64)
    plan = spend_budget(ExactGlobal(usage_weight=0.25), statistics, budget=Budget(active=0.6, keep_ratio=0.7)).plan
    assert json.loads(plan.provenance["settings"])["usage_weight"] == 0.25
    with pytest.raises(ValueError, match=r"`usage_weight` must be in \[0, 1\], got 1.5"):
        ExactGlobal(usage_weight=1.5)


@pytest.mark.parametrize("name", ["reap", "tb_coverage", "uniform"])
def test_methods_with_larger_steps_take_the_largest_that_fits(name):
    sizes, statistics = tiny_sizes_and_statistics()
    method = build_method(name) if name != "uniform" else build_method(name, align=8)
    wanted = sizes.num_bytes([[20] * 8] * 2)
    spent = spend_budget(method, statistics, budget=Budget(bytes=wanted), sizes=sizes)
    assert spent.reached["bytes"] <= wanted
    # 5 of 8 experts whole, or 16 of 32 channels.
    expected = {0, 32} if name != "uniform" else {16}
    assert {width for own in widths_of(spent.plan) for width in own} == expected
    assert spent.plan.num_kept == (2 * 5 * 32 if name != "uniform" else 2 * 8 * 16)
    assert spent.plan.prune_ratio == spent.plan.achieved_prune_ratio


@pytest.mark.parametrize("name", ["exact_global", "reap", "tb_coverage", "expert_sparsity"])
def test_the_plan_can_be_made_again_from_its_provenance(name):
    # Experts of different widths: the ratio that is reached is not the one that leads to it.
    sizes, _ = tiny_sizes_and_statistics()
    statistics = make_statistics(width=[32, 28, 8, 32, 16, 24, 16, 32], optional=True, seed=1)
    for keep_ratio in (0.45, 0.63, 0.8):
        budget = Budget(keep_ratio=keep_ratio, bytes=10**9)
        plan = spend_budget(build_method(name), statistics, budget=budget, sizes=sizes).plan
        method = build_method(plan.method, **json.loads(plan.provenance["settings"]))
        again = method.plan(statistics, prune_ratio=json.loads(plan.provenance["budget"])["method_ratio"])
        assert kept(again) == kept(plan)


def test_a_budget_of_the_files_says_how_they_are_stored():
    sizes, statistics = tiny_sizes_and_statistics(16)
    plan = spend_budget(ExactGlobal(), statistics, budget=Budget(bytes=10**9), sizes=sizes).plan
    record = json.loads(plan.provenance["budget"])
    assert (record["bits"], record["dtype"], record["method_ratio"]) == (16, "bfloat16", 0.0)
    assert "bits" not in json.loads(
        spend_budget(ExactGlobal(), statistics, budget=Budget(active=0.5)).plan.provenance["budget"]
    )


def test_a_ratio_alone_is_the_methods_own():
    statistics = make_statistics()
    for method in (ExactGlobal(), PaperA()):
        plan = spend_budget(method, statistics, budget=Budget(prune_ratio=0.5)).plan
        assert plan.digest == method.plan(statistics, prune_ratio=0.5).digest
        assert plan.digest == spend_budget(method, statistics, budget=Budget(keep_ratio=0.5)).plan.digest
        record = json.loads(plan.provenance["budget"])
        assert record["asked"] == {"prune_ratio": 0.5}
        assert record["binding"] == ["prune_ratio"]


def test_a_budget_above_the_model_keeps_all_of_it():
    sizes, statistics = tiny_sizes_and_statistics()
    spent = spend_budget(ExactGlobal(), statistics, budget=Budget(bytes=10**9, active=1.0), sizes=sizes)
    assert spent.plan.num_kept == statistics.shape.num_channels
    assert spent.binding == ()
    assert spent.before == spent.reached


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("11.5GB", 11_500_000_000),
        ("1 KiB", 1024),
        ("3mb", 3_000_000),
        ("900000", 900_000),
        ("900B", 900),
        (9000, 9000),
        (".5GiB", 2**29),
    ],
)
def test_sizes_in_words(text, expected):
    assert parse_bytes(text) == expected


def test_parameters_in_words():
    assert [parse_params(text) for text in ("3.2M", "16B", "5570560", "2k")] == [3_200_000, 16 * 10**9, 5_570_560, 2000]
    assert [format_bytes(11.5e9), format_bytes(950), format_params(3.2e6)] == ["11.500 GB", "950 B", "3.200M"]
    with pytest.raises(ValueError, match=r"'4 parsec' is not a size in bytes. Write it like 11.5GB"):
        parse_bytes("4 parsec")
    with pytest.raises(ValueError, match=r"'0.999' would be 1 bytes. Give its unit: 0.999GB, say, or 0.999B"):
        parse_bytes("0.999")
    with pytest.raises(ValueError, match="10 would be 10 bytes"):
        parse_bytes(10)
    with pytest.raises(ValueError, match="'-3M' is not a number of parameters"):
        parse_params("-3M")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "A budget needs at least one of"),
        ({"prune_ratio": 0.5, "keep_ratio": 0.5}, "Give exactly one of `prune_ratio`"),
        ({"prune_ratio": 1.0}, r"`prune_ratio` must be in \[0, 1\), got 1.0"),
        ({"bytes": 0}, "`bytes` of a budget must be a whole number >= 1, got 0"),
        ({"stored_params": 1.5}, "`stored_params` of a budget must be a whole number >= 1, got 1.5"),
        ({"active": 0.0}, r"`active` must be in \(0, 1\], got 0.0"),
    ],
)
def test_wrong_budgets_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Budget(**values)


def test_what_cannot_be_met_is_said_before_a_plan_is_made(monkeypatch):
    sizes, statistics = tiny_sizes_and_statistics(bits=16)
    monkeypatch.setattr(ExactGlobal, "plan", lambda *_, **__: pytest.fail("planned"))
    smallest = format_bytes(sizes.num_bytes([[4, 4] + [0] * 6] * 2))
    match = rf"No plan keeps bytes within 1.000 KB: .* it is {smallest}. Ask for more, count in 4 bit"
    with pytest.raises(ValueError, match=match):
        spend_budget(ExactGlobal(align=4), statistics, budget=Budget(bytes=1000), sizes=sizes)
    with pytest.raises(
        ValueError, match=r"No plan keeps active within 0.1000: .* it is 0.1250. Ask for more, or lower"
    ):
        spend_budget(ExactGlobal(align=4), statistics, budget=Budget(active=0.1))
    with pytest.raises(ValueError, match="needs the sizes of the model's files: give `sizes`"):
        spend_budget(ExactGlobal(), statistics, budget=Budget(bytes=10**6))


def test_the_smallest_plan_of_a_method_is_named():
    statistics = make_statistics(num_layers=2, num_experts=8, width=32)
    with pytest.raises(ValueError, match=r"No plan of 'exact_global' keeps keep_ratio within 0.2000: .* has 0.2500"):
        spend_budget(ExactGlobal(align=8, expert_floor=8), statistics, budget=Budget(keep_ratio=0.2, active=1.0))
    with pytest.raises(ValueError, match=r"No plan of 'expert_dropping' .* has 1.0000 .* take a method that cuts"):
        spend_budget(build_method("reap"), statistics, budget=Budget(active=0.8))
    with pytest.raises(ValueError, match=r"No plan of 'expert_dropping' .* cut channels instead"):
        spend_budget(build_method("reap"), statistics, budget=Budget(keep_ratio=0.1, active=1.0))


def test_settings_that_a_method_refuses_are_no_matter_of_the_budget():
    statistics = make_statistics()
    with pytest.raises(ValueError, match="Calibrate again"):
        spend_budget(build_method("mone"), statistics, budget=Budget(active=1.0, keep_ratio=0.5))
    sizes, _ = tiny_sizes_and_statistics()
    with pytest.raises(ValueError, match=r"The sizes are of another model: hidden size 64 and 2 MoE layers"):
        spend_budget(ExactGlobal(), make_statistics(num_layers=3), budget=Budget(bytes=10**6), sizes=sizes)
