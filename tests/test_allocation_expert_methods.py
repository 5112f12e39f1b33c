"""Whole experts: over all layers, by sets, at random, and by corpora that take turns."""

import json
from itertools import combinations

import pytest
import torch
from statistics_factory import hand_statistics, make_shape, make_statistics, shape_of

from callbacks import ExpertPruning
from lightning_moe.allocation import ExpertDropping, ExpertSparsity, RandomExperts, TBCoverage, build_method
from lightning_moe.allocation.expert_coverage import FILLS
from lightning_moe.allocation.expert_dropping import drop_experts_globally
from lightning_moe.allocation.expert_subsets import drop_subsets
from lightning_moe.criteria import EXPERT_CRITERIA
from lightning_moe.records import CalibrationStatistics, ExpertScores
from lightning_moe.surgery.feasibility import check_reachable


def doubles(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def experts_of(shape, keep):
    return [
        [index for index, part in enumerate(keep_C.split(layer.widths)) if bool(part.any())]
        for layer, keep_C in zip(shape.layers, keep, strict=True)
    ]


def kept(plan):
    return experts_of(plan.shape, plan.keep)


def several(shape, *, num_tokens=10, **corpora):
    """Statistics of several corpora; each is one mapping per layer."""
    made = {
        name: hand_statistics(shape, layers=layers, num_tokens=num_tokens * (index + 1))
        for index, (name, layers) in enumerate(corpora.items())
    }
    first = next(iter(made.values()))
    layers = {name: own.corpora["text"] for name, own in made.items()}
    return CalibrationStatistics(shape=shape, corpora=layers, weights=first.weights)


# --- one ranking of the model ---------------------------------------------------------------------------------------


def test_global_scope_by_hand():
    # Each layer keeps its best (9 and 3), then the best of all others is the 8 of the first layer.
    shape = shape_of([2] * 3, [2] * 3)
    statistics = hand_statistics(shape, layers=[{"ablation": [9, 8, 7]}, {"ablation": [1, 2, 3]}])
    assert kept(ExpertDropping(criterion="ablation", scope="global").plan(statistics, prune_ratio=0.5)) == [[0, 1], [2]]
    assert kept(ExpertDropping(criterion="ablation").plan(statistics, prune_ratio=1 / 3)) == [[0, 1], [1, 2]]


def test_global_scope_keeps_what_groups_need():
    shape = shape_of([1] * 8, [1] * 8, top_k=4, num_groups=2, top_k_groups=2)
    scores = ExpertScores(shape=shape, criterion="x", scores=(doubles(*range(8, 16)), doubles(*range(8))))
    assert experts_of(shape, drop_experts_globally(scores, prune_ratio=0.25)) == [list(range(8)), [2, 3, 6, 7]]
    with pytest.raises(ValueError, match=r"keeps 6 of the model's 16 experts, but 8 must stay; layers.0.experts alone"):
        drop_experts_globally(scores, prune_ratio=0.625)
    with pytest.raises(ValueError, match=r"`prune_ratio` must be in \[0, 1\), got 1"):
        drop_experts_globally(scores, prune_ratio=1)
    assert all(bool(keep_C.all()) for keep_C in drop_experts_globally(scores, prune_ratio=0))


def test_a_cut_model_is_cut_by_channels():
    # Widths 4 and 1: 10 channels; half of them are 5. After the two best (4 + 1) comes nothing nearer.
    shape = shape_of([4, 1], [4, 1])
    scores = ExpertScores(shape=shape, criterion="x", scores=(doubles(9, 1), doubles(2, 8)))
    assert experts_of(shape, drop_experts_globally(scores, prune_ratio=0.5)) == [[0], [1]]


def test_an_impossible_global_ratio_is_refused_before_training():
    shape = make_shape(num_layers=2, num_experts=8, top_k=4)
    method = ExpertDropping(criterion="ablation", scope="global")
    check_reachable(shape, method=method, prune_ratio=0.5)
    with pytest.raises(ValueError, match=r"Prune ratio 0.6 leaves 6 of the model's 16 experts, but 8 must stay"):
        check_reachable(shape, method=method, prune_ratio=0.6)
    with pytest.raises(ValueError, match=r"layers.0.mlp.experts: prune ratio 0.6 leaves 3 of 8 experts, but 4 must"):
        check_reachable(shape, method=TBCoverage(), prune_ratio=0.6)


# --- at random ------------------------------------------------------------------------------------------------------


def test_random_plans_repeat_with_their_seed():
    statistics = make_statistics(num_experts=16, num_layers=3)
    plans = {seed: RandomExperts(seed=seed).plan(statistics, prune_ratio=0.5) for seed in range(4)}
    assert len({plan.digest for plan in plans.values()}) == 4
    assert build_method("random", seed=3).plan(statistics, prune_ratio=0.5).digest == plans[3].digest
    assert all(len(layer) == 8 for plan in plans.values() for layer in kept(plan))
    # Drawn once from the generator of seed 0, layer after layer; the same on every machine.
    generator = torch.Generator().manual_seed(0)
    best_E = torch.rand(16, generator=generator, dtype=torch.float64).topk(8).indices
    assert kept(plans[0])[0] == sorted(best_E.tolist())


# --- sets of experts ------------------------------------------------------------------------------------------------


def random_gram(num_experts, *, seed):
    outputs_ET = torch.randn(num_experts, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return outputs_ET @ outputs_ET.T


@pytest.mark.parametrize(
    ("num_experts", "groups", "num_kept"), [*((8, 1, kept) for kept in range(1, 8)), (12, 4, 8), (12, 4, 10)]
)
def test_the_best_set_by_brute_force(num_experts, groups, num_kept):
    # Four groups of three, two of them chosen with top-1: each keeps two, because groups are ranked by their two best.
    shape = shape_of([3] * num_experts, num_groups=groups, top_k_groups=min(groups, 2), top_k=1)
    gram_EE = random_gram(num_experts, seed=num_kept)
    errors = {}
    for chosen in combinations(range(num_experts), num_kept):
        if any(sum(expert // 3 == group for expert in chosen) < 2 for group in range(groups if groups > 1 else 0)):
            continue
        gone = [expert for expert in range(num_experts) if expert not in chosen]
        errors[chosen] = sum(float(gram_EE[i, j]) for i in gone for j in gone)
    best = min(errors, key=lambda chosen: errors[chosen])
    got = drop_subsets(shape, grams=[gram_EE], prune_ratio=1 - num_kept / num_experts)
    assert experts_of(shape, got) == [list(best)]


def test_greedy_by_hand():
    # Experts 1 and 2 cancel: without both the error is 1.1 + 1.1 - 2 = 0.2. One by one expert 0 goes first (1.0).
    gram_EE = torch.tensor([[1, 0, 0], [0, 1.1, -1], [0, -1, 1.1]], dtype=torch.float64)
    shape = shape_of([2] * 3)
    assert experts_of(shape, drop_subsets(shape, grams=[gram_EE], prune_ratio=2 / 3)) == [[0]]
    assert experts_of(shape, drop_subsets(shape, grams=[gram_EE], prune_ratio=2 / 3, max_subsets=2)) == [[2]]


@pytest.mark.parametrize("max_subsets", [0, 100_000])
def test_sets_leave_every_group_what_it_needs(max_subsets):
    # The second group gives next to nothing, and keeps two experts all the same.
    gram_EE = torch.diag(doubles(9, 8, 7, 6, 0.1, 0.2, 0.3, 0.4))
    shape = shape_of([1] * 8, top_k=4, num_groups=2, top_k_groups=2)
    got = drop_subsets(shape, grams=[gram_EE], prune_ratio=0.5, max_subsets=max_subsets)
    assert experts_of(shape, got) == [[0, 1, 6, 7]]
    with pytest.raises(ValueError, match=r"layers.0.experts: `prune_ratio`=0.75 keeps 2 of 8 experts, but 4 must stay"):
        drop_subsets(shape, grams=[gram_EE], prune_ratio=0.75, max_subsets=max_subsets)


def test_sets_of_a_cut_model_leave_out_masked_experts():
    shape = shape_of([2, 0, 2, 2])
    got = drop_subsets(shape, grams=[torch.diag(doubles(1, 9, 3, 2))], prune_ratio=1 / 3)
    assert experts_of(shape, got) == [[2, 3]]


def test_sets_of_experts_of_different_widths_are_cut_by_channels():
    # By error experts go in the order 3, 2, 1, 0: after 8 of 12 channels are gone, expert 0 and its 4 are left.
    grams = [torch.diag(doubles(9, 3, 2, 1))]
    shape = shape_of([4, 6, 1, 1])
    assert experts_of(shape, drop_subsets(shape, grams=grams, prune_ratio=8 / 12)) == [[0]]
    # Half of the experts would be 0 and 1 with 10 channels; 10 of 12 are nearest to 9, and 4 to 6.
    assert experts_of(shape, drop_subsets(shape, grams=grams, prune_ratio=3 / 12)) == [[0, 1]]
    assert experts_of(shape, drop_subsets(shape, grams=grams, prune_ratio=0.5)) == [[0]]
    assert ExpertSparsity().remarks(shape, prune_ratio=0.5)["search"] == "greedy"
    with pytest.raises(ValueError, match="keeps 1 of 4 experts, but 2 must stay"):
        drop_subsets(shape_of([4, 6, 1, 1], top_k=2), grams=grams, prune_ratio=0.5)


def test_the_plan_says_how_sets_were_searched():
    statistics = make_statistics(num_experts=8, optional=True)
    found = ExpertSparsity().plan(statistics, prune_ratio=0.5).provenance
    assert (found["search"], found["rerouting"]) == ("exhaustive", "not modelled: gates held")
    assert ExpertSparsity(max_subsets=69).plan(statistics, prune_ratio=0.5).provenance["search"] == "greedy"  # C(8, 4)
    remarks = ExpertSparsity().remarks(shape_of([1] * 8, [1] * 40, [1] * 40), prune_ratio=0.5)
    assert remarks["search"] == "exhaustive in 1 layers, greedy in 2 layers"
    many = make_statistics(num_layers=1, num_experts=128, width=4, optional=True)
    plan = ExpertSparsity().plan(many, prune_ratio=0.5)
    assert (len(kept(plan)[0]), plan.provenance["search"]) == (64, "greedy")
    with pytest.raises(ValueError, match=r"'expert_sparsity' needs 'output_gram', .* `calibrate --moments true`"):
        ExpertSparsity().plan(make_statistics(), prune_ratio=0.5)


# --- paper B --------------------------------------------------------------------------------------------------------

# REAP is the mean of `weighted_norm`: prose 9 8 7 1 (shares of 25), code 1 1 1 6 (shares of 9), together 10 9 8 7.
PROSE, CODE = [{"weighted_norm": [9, 8, 7, 1]}], [{"weighted_norm": [1, 1, 1, 6]}]


@pytest.mark.parametrize(
    ("settings", "experts"),
    [
        ({}, [0, 3]),  # prose protects 0; shares sum to 0.47 0.43 0.39 0.71, so 3 follows
        ({"fill": "pooled"}, [0, 1]),  # prose protects 0, then 10 9 8 7
        ({"fill": "pooled", "protected_share": 1.0}, [0, 3]),  # prose protects 0, code 3
        ({"fill": "pooled", "protected_count": 2}, [0, 3]),
        ({"fill": "pooled", "protected_share": 0.0}, [0, 1]),
        ({"fill": "pooled", "order": "name"}, [0, 3]),  # code protects 3
        ({"fill": "pooled", "order": "tokens"}, [0, 3]),  # code has twice the tokens
        ({"fill": "sum", "normalise": "none", "protected_share": 0.0}, [0, 1]),
        ({"fill": "max", "normalise": "none", "protected_share": 0.0}, [0, 1]),
        ({"fill": "max", "protected_share": 0.0}, [0, 3]),  # 0.36 0.32 0.28 and 0.67
    ],
)
def test_coverage_by_hand(settings, experts):
    shape = shape_of([2] * 4)
    statistics = several(shape, prose=PROSE, code=CODE)
    plan = TBCoverage(**settings).plan(statistics, prune_ratio=0.5)
    assert kept(plan) == [experts]
    assert json.loads(plan.provenance["settings"])["utility"] == "reap"


def test_fill_rules_by_hand():
    utility_KE, tokens_K = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]], dtype=torch.float64), doubles(3, 1)
    wanted = {
        "sum": doubles(0.6, 0.5, 0.9),
        "mean": doubles(1.6, 1.1, 1.3) / 4,  # three parts of the first corpus, one of the second
        "max": doubles(0.5, 0.3, 0.7),
        # Places 2 1 0 and 0 1 2; half the mean of 1 0.6 0.4 and 1/7 2/7 1 settles equals.
        "rank": 2 + (doubles(1, 0.6, 0.4) + doubles(1 / 7, 2 / 7, 1)) / 4,
    }
    assert set(wanted) == set(FILLS)
    for name, aggregate_E in wanted.items():
        torch.testing.assert_close(FILLS[name](utility_KE, tokens_K), aggregate_E)


def test_equals_share_a_rank():
    # Places: 2 0 0 0 (three unused experts) and 0 1 1 3. Halves of the mean shares settle equals.
    utility_KE = torch.tensor([[4.0, 0, 0, 0], [0, 1, 1, 2]], dtype=torch.float64)
    wanted = doubles(3, 1, 1, 3) + (doubles(1, 0, 0, 0) + doubles(0, 0.5, 0.5, 1)) / 4
    torch.testing.assert_close(FILLS["rank"](utility_KE, doubles(1, 1)), wanted)


@pytest.mark.parametrize("seed", range(5))
def test_ranks_do_not_depend_on_the_order_of_experts(seed):
    generator = torch.Generator().manual_seed(seed)
    utility_KE = torch.rand(2, 8, generator=generator, dtype=torch.float64)
    utility_KE[0, :4], utility_KE[1, 5:] = 0, 0
    order_E = torch.randperm(8, generator=generator)
    shuffled_E = FILLS["rank"](utility_KE[:, order_E], doubles(1, 1))
    torch.testing.assert_close(shuffled_E, FILLS["rank"](utility_KE, doubles(1, 1))[order_E])


@pytest.mark.parametrize("fill", [*FILLS, "pooled"])
@pytest.mark.parametrize("utility", ["reap", "ablation", "frequency"])
def test_one_corpus_is_the_plain_ranking(fill, utility):
    statistics = make_statistics(num_experts=16)
    covered = TBCoverage(utility=utility, fill=fill).plan(statistics, prune_ratio=0.5)
    assert kept(covered) == kept(ExpertDropping(criterion=utility).plan(statistics, prune_ratio=0.5))


@pytest.mark.parametrize("names", ["ab", "abcde"])
@pytest.mark.parametrize("prune_ratio", [0.25, 0.5, 0.75])
def test_every_corpus_keeps_its_best_experts(names, prune_ratio):
    statistics = make_statistics(num_experts=32, corpora=list(names))
    plan = TBCoverage(protected_share=1.0).plan(statistics, prune_ratio=prune_ratio)
    for layer, experts in enumerate(kept(plan)):
        assert len(experts) == round((1 - prune_ratio) * 32)
        for name in names:
            assert int(EXPERT_CRITERIA["reap"](statistics, corpora=[name]).scores[layer].argmax()) in experts


def test_groups_come_before_protection():
    # Both corpora like the first group only; the second keeps its two experts.
    shape = shape_of([1] * 8, top_k=4, num_groups=2, top_k_groups=2)
    layers = [{"weighted_norm": [9, 8, 7, 6, 1, 2, 3, 4]}]
    plan = TBCoverage(protected_share=1.0).plan(several(shape, a=layers, b=layers), prune_ratio=0.5)
    assert kept(plan) == [[0, 1, 6, 7]]


def test_too_many_protected_experts_are_an_error():
    statistics = make_statistics(num_experts=8)
    with pytest.raises(ValueError, match=r"layers.0.mlp.experts: `protected_count`=5 is more than the 4 experts that"):
        TBCoverage(protected_count=5).plan(statistics, prune_ratio=0.5)


@pytest.mark.parametrize("method", ["tb_coverage", "expert_sparsity", "random", "reap", "frequency"])
def test_the_callback_takes_every_method_of_whole_experts(method):
    assert ExpertPruning(keep_ratio=0.5, method=method).method == build_method(method)
    with pytest.raises(ValueError, match="needs a method that drops whole experts, such as 'reap', got 'wanda'"):
        ExpertPruning(keep_ratio=0.5, method="wanda")
