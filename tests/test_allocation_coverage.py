import math

import pytest
import torch

from lightning_moe.allocation.coverage import MAX_ITERATIONS, SortedGroups, cover
from lightning_moe.allocation.smoothing import SMOOTHINGS, check_smoothing, smooth


def doubles(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def naive_cover(groups, *, weights, budget, floors):
    """The same search written as loops over Python lists, one channel repaired at a time."""
    groups = [sorted(group, reverse=True) for group in groups]

    def count(group, *, coverage):
        total = 0.0
        for value in group:
            total += value
        target, prefix, num = coverage * total, 0.0, 0
        while prefix < target:
            prefix += group[num]
            num += 1
        return num

    low, high, multiplier, best = 0.0, math.inf, 1.0, list(floors)
    for _ in range(MAX_ITERATIONS):
        counts = [
            max(count(group, coverage=min(1.0, multiplier * weight)), floor)
            for group, weight, floor in zip(groups, weights, floors, strict=True)
        ]
        if sum(counts) > budget:
            high = multiplier
        else:
            low, best = multiplier, counts
        if sum(best) == budget:
            break
        multiplier = 2 * low if high == math.inf else (low + high) / 2
    while sum(best) < budget:
        marginal = [group[num] if num < len(group) else -1.0 for group, num in zip(groups, best, strict=True)]
        best[marginal.index(max(marginal))] += 1
    return best


# --- counts for a coverage ------------------------------------------------------------------------------------------


def test_covering_counts_by_hand():
    groups = SortedGroups.of([doubles(1, 4, 2, 3), doubles(1, 1)])
    # Prefix sums 4 7 9 10 and 1 2. Half of 10 is 5 <= 7: two channels; half of 2 is 1 <= 1: one channel.
    assert groups.covering_counts(doubles(0.5, 0.5)).tolist() == [2, 1]
    assert groups.covering_counts(doubles(0.7, 0.51)).tolist() == [2, 2]
    assert groups.covering_counts(doubles(1.0, 0.0)).tolist() == [4, 0]


def test_full_coverage_leaves_out_worthless_channels():
    assert SortedGroups.of([doubles(3, 0, 0)]).covering_counts(doubles(1.0)).tolist() == [1]


def test_empty_and_dead_groups_count_nothing():
    groups = SortedGroups.of([doubles(), doubles(0, 0), doubles(2, 1)])
    assert groups.covering_counts(doubles(1, 1, 1)).tolist() == [0, 0, 2]


# --- the search -----------------------------------------------------------------------------------------------------


def test_equal_weights_by_hand():
    # Coverage one half of both: 4 + 3 >= 5 needs two, 1 + 1 >= 2 needs two.
    assert cover([doubles(4, 3, 2, 1), doubles(1, 1, 1, 1)], weight_G=doubles(1, 1), budget=4).tolist() == [2, 2]


def test_weights_by_hand():
    # For m in (0.375, 0.4]: A needs 10 m <= 4, one channel; B needs 4 * 2 m in (3, 3.2], four channels.
    assert cover([doubles(4, 3, 2, 1), doubles(1, 1, 1, 1)], weight_G=doubles(1, 2), budget=5).tolist() == [1, 4]


def test_repair_adds_the_largest_marginal_score():
    # Equal groups jump together: 2 + 2 of 8 is under the budget 5, 3 + 3 above; the next channels are worth 0.9 and 1.
    groups = [doubles(10, 10, 0.9, 0.8), doubles(10, 10, 1, 0.7)]
    assert cover(groups, weight_G=doubles(1, 1), budget=5).tolist() == [2, 3]


def test_repair_of_equals_takes_the_first_group():
    assert cover([doubles(5, 5), doubles(5, 5)], weight_G=doubles(1, 1), budget=3).tolist() == [2, 1]


def test_bracket_widens_beyond_the_published_cap():
    # With m capped at 1 coverage would end at one half, one channel each; the budget needs m = 2.
    assert cover([doubles(1, 1), doubles(1, 1)], weight_G=doubles(0.5, 0.5), budget=4).tolist() == [2, 2]


def test_tiny_weights_are_reached():
    assert cover([doubles(3, 2, 1), doubles(3, 2, 1)], weight_G=doubles(1, 1e-9), budget=5).tolist() == [3, 2]


def test_zero_weight_gets_only_what_nobody_else_can_take():
    groups, weight_G = [doubles(1, 1), doubles(9, 9)], doubles(1, 0)
    assert cover(groups, weight_G=weight_G, budget=2).tolist() == [2, 0]
    assert cover(groups, weight_G=weight_G, budget=3).tolist() == [2, 1]


def test_all_zero_weights_count_as_equal():
    groups = [doubles(4, 3, 2, 1), doubles(1, 1, 1, 1)]
    assert cover(groups, weight_G=doubles(0, 0), budget=4).tolist() == [2, 2]


def test_floors_are_kept():
    groups = [doubles(100, 100, 100), doubles(1, 1, 1)]
    floored = cover(groups, weight_G=doubles(1, 0), budget=4, floor_G=torch.tensor([0, 2]))
    assert floored.tolist() == [2, 2]


@pytest.mark.parametrize("budget", [0, 9])
def test_ends_of_the_budget(budget):
    groups = [doubles(4, 3, 2, 0), doubles(1, 1, 1, 0, 0)]
    assert int(cover(groups, weight_G=doubles(1, 3), budget=budget).sum()) == budget


@pytest.mark.parametrize("seed", range(25))
def test_equals_the_naive_loop(seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(0, 30, (6,), generator=generator).tolist()
    # Sixteenths add up without rounding, so both ways of summing agree to the bit and ties are common.
    groups = [torch.randint(0, 64, (size,), generator=generator).double() / 16 for size in sizes]
    weight_G = torch.rand(6, generator=generator, dtype=torch.float64) * 2
    floor_G = torch.tensor([min(size, seed % 3) for size in sizes])
    for budget in {int(floor_G.sum()), sum(sizes) // 3 + int(floor_G.sum()) // 2, sum(sizes) // 2 + 3, sum(sizes)}:
        got = cover(groups, weight_G=weight_G, budget=budget, floor_G=floor_G).tolist()
        lists = [group.tolist() for group in groups]
        assert got == naive_cover(lists, weights=weight_G.tolist(), budget=budget, floors=floor_G.tolist())
        assert sum(got) == budget
        assert all(floor <= num <= size for floor, num, size in zip(floor_G.tolist(), got, sizes, strict=True))


def test_permuted_groups_give_permuted_counts():
    generator = torch.Generator().manual_seed(0)
    groups = [torch.rand(size, generator=generator, dtype=torch.float64) for size in (5, 17, 9, 30)]
    weight_G, order = torch.rand(4, generator=generator, dtype=torch.float64), [2, 0, 3, 1]
    count_G = cover(groups, weight_G=weight_G, budget=23)
    turned_G = cover([groups[g] for g in order], weight_G=weight_G[order], budget=23)
    assert turned_G.tolist() == count_G[order].tolist()


def test_scaling_a_group_does_not_change_its_coverage():
    groups = [doubles(8, 4, 2, 1), doubles(8, 8, 8, 8)]
    assert (
        cover(groups, weight_G=doubles(1, 1), budget=4).tolist()
        == cover([groups[0] * 1024, groups[1]], weight_G=doubles(1, 1), budget=4).tolist()
    )


@pytest.mark.parametrize("weight_G", [doubles(1, -1), doubles(1, float("nan")), doubles(float("inf"), 1)])
def test_bad_weights_are_refused(weight_G):
    with pytest.raises(ValueError, match=r"Coverage weights must be finite and not negative, got \["):
        cover([doubles(1), doubles(1)], weight_G=weight_G, budget=1)


@pytest.mark.parametrize("budget", [1, 5])
def test_impossible_budget_is_refused(budget):
    with pytest.raises(ValueError, match=rf"budget of {budget} channels must be between the floors' 2 and all 4"):
        cover([doubles(1, 1), doubles(1, 1)], weight_G=doubles(1, 1), budget=budget, floor_G=torch.tensor([1, 1]))


# --- smoothing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("smoothing", "loss", "expected"),
    [
        ("none", [1, 3], [0.5, 1.5]),  # / 2
        ("sqrt", [1, 9], [0.5, 1.5]),  # 1, 3; / 2
        # 256^(1/16) = sqrt 2; two values lie one standard deviation from their mean, so nothing is clamped.
        ("sqrt4", [1, 256], [2 / (1 + math.sqrt(2)), 2 * math.sqrt(2) / (1 + math.sqrt(2))]),
        # Mean 2, variance (4 + 4 + 4 + 36) / 4 = 12: 8 becomes 2 + sqrt 12, four times the new mean.
        ("clip", [0, 0, 0, 8], [0, 0, 0, 4]),
        # Mean 2: log 1.5 = 0.405465, log 2.5 = 0.916291; their mean is 0.660878.
        ("log", [1, 3], [0.613525, 1.386475]),
        # Median 2.5, deviations 1.5 0.5 0.5 97.5 with median 1: 100 becomes 2.5 + 1.345 * 1.4826 = 4.494097;
        # the mean of 1 2 3 4.494097 is 2.623524.
        ("huber", [1, 2, 3, 100], [0.381167, 0.762333, 1.143500, 1.712999]),
    ],
)
def test_smoothing_by_hand(smoothing, loss, expected):
    assert smooth(doubles(*loss), smoothing=smoothing).tolist() == pytest.approx(expected, rel=1e-5)


def test_sqrt4_equals_four_rounds_of_square_root_and_clamp():
    values = [0.1, 1.0, 2.0, 50.0, 3.0, 0.01]
    for _ in range(4):
        values = [math.sqrt(value) for value in values]
        mean = sum(values) / 6
        std = math.sqrt(sum((value - mean) ** 2 for value in values) / 6)
        values = [min(max(value, mean - std), mean + std) for value in values]
    mean = sum(values) / 6
    assert smooth(doubles(0.1, 1, 2, 50, 3, 0.01)).tolist() == pytest.approx([value / mean for value in values])


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_weights_have_mean_one_and_forget_the_unit(smoothing):
    loss_L = torch.rand(12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    weight_L = smooth(loss_L, smoothing=smoothing)
    assert float(weight_L.mean()) == pytest.approx(1.0)
    assert float(weight_L.min()) >= 0
    assert torch.allclose(smooth(loss_L * 1e6, smoothing=smoothing), weight_L)


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_one_layer_and_dead_layers_weigh_one(smoothing):
    assert smooth(doubles(7), smoothing=smoothing).tolist() == pytest.approx([1.0])
    assert smooth(doubles(0, 0), smoothing=smoothing).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_smoothing_never_turns_the_order_around(smoothing):
    weight_L = smooth(doubles(1, 2, 4, 8, 100), smoothing=smoothing)
    assert bool((weight_L.diff() >= 0).all())


def test_unknown_smoothing_is_refused():
    with pytest.raises(ValueError, match=r"`smoothing` must be one of \['sqrt4', 'none', .*\], got 'tanh'"):
        check_smoothing("tanh")
    with pytest.raises(ValueError, match="got 'sqrt5'"):
        smooth(doubles(1, 2), smoothing="sqrt5")
