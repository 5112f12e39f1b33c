"""How a budget is spread over the layers: uniform, U-shaped, by loss; and the ranking inside a layer."""

import pytest
import torch
from statistics_factory import hand_statistics, make_shape, make_statistics, shape_of

from lightning_moe.allocation import ChannelRanking, ExactGlobal, build_method
from lightning_moe.allocation.layer_budgets import rank_in_layers, spread_blocks, u_shape
from lightning_moe.criteria import CHANNEL_CRITERIA
from lightning_moe.records import ChannelScores


def doubles(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def spread(*weights, shape, **settings):
    return spread_blocks(shape, weight_L=doubles(*weights), align=2, **settings).tolist()


def layer_sizes(plan):
    return [sum(plan.widths(index)) for index in range(len(plan.keep))]


# --- weights --------------------------------------------------------------------------------------------------------


def test_the_u_by_hand():
    # x^2 is 1 0 1, its mean 2/3: 1 + 0.6 * 1/3 and 1 - 0.6 * 2/3.
    assert u_shape(3, strength=0.6).tolist() == pytest.approx([1.2, 0.6, 1.2])
    # x^2 is 1, 1/4, 0, 1/4, 1, mean 1/2.
    assert u_shape(5, strength=1.0).tolist() == pytest.approx([1.5, 0.75, 0.5, 0.75, 1.5])
    assert u_shape(4, strength=0.0).tolist() == [1.0] * 4
    assert u_shape(1, strength=1.0).tolist() == [1.0]
    assert u_shape(2, strength=1.0).tolist() == [1.0, 1.0]
    assert float(u_shape(48, strength=1.0).min()) > 0


# --- blocks per layer -----------------------------------------------------------------------------------------------

# Two layers of four experts of four channels: 8 blocks of two each.
TWO = shape_of([4] * 4, [4] * 4)


@pytest.mark.parametrize(
    ("weights", "prune_ratio", "blocks"),
    [
        ((1, 1), 0.5, [4, 4]),
        ((3, 1), 0.5, [6, 2]),
        ((9, 1), 0.5, [7, 1]),  # 7.2 and 0.8, but top-1 needs a block: 7 and 1
        ((1000, 1), 0.5, [7, 1]),
        ((1000, 1), 0.25, [8, 4]),  # the first layer has no more than 8
        ((0, 1), 0.25, [4, 8]),  # what the second cannot take
        ((0, 0), 0.5, [4, 4]),
        ((5, 3), 0.75, [3, 1]),  # 2.5 and 1.5: equal remainders, the first layer's comes first
    ],
)
def test_blocks_by_hand(weights, prune_ratio, blocks):
    assert spread(*weights, shape=TWO, prune_ratio=prune_ratio) == blocks


def test_a_layer_keeps_what_tokens_need():
    shape = shape_of([4] * 4, [4] * 4, top_k=3)
    assert spread(9, 1, shape=shape, prune_ratio=0.5) == [5, 3]
    grouped = shape_of([4] * 4, [4] * 4, top_k=2, num_groups=2, top_k_groups=1)
    assert spread(9, 1, shape=grouped, prune_ratio=0.5) == [4, 4]
    with pytest.raises(ValueError, match=r"budget is 5 blocks of .* need 6 .* layers.0.experts alone needs 3"):
        spread(1, 1, shape=shape, prune_ratio=0.7)


def test_largest_remainders_take_the_rest():
    shape = shape_of([4] * 4, [4] * 4, [4] * 4)
    assert spread(1, 1, 1, shape=shape, prune_ratio=14 / 24) == [4, 3, 3]  # 10 blocks
    assert spread(2, 1, 1.1, shape=shape, prune_ratio=14 / 24) == [5, 2, 3]  # 4.88, 2.44 and 2.68


@pytest.mark.parametrize("prune_ratio", [0.03, 0.25, 0.5, 0.7])
@pytest.mark.parametrize("seed", range(4))
def test_the_sum_is_exact_and_shares_follow_the_weights(prune_ratio, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = make_shape(num_layers=7, num_experts=8, width=[32, 33, 16, 48, 32, 64, 32, 32])
    weight_L = torch.rand(7, generator=generator, dtype=torch.float64) + 0.1
    block_L = spread_blocks(shape, weight_L=weight_L, prune_ratio=prune_ratio, align=4)
    total = round((1 - prune_ratio) * shape.num_channels) // 4
    capacity = sum(width // 4 for width in shape.layers[0].widths)
    assert int(block_L.sum()) == total
    inside_L = (block_L > 2) & (block_L < capacity)
    if int(inside_L.sum()) > 1:
        factor_L = block_L[inside_L] / weight_L[inside_L]
        # Two layers between the bounds differ by less than a block each.
        assert float(factor_L.max() - factor_L.min()) <= 2 / float(weight_L.min())


# --- the rankings ---------------------------------------------------------------------------------------------------


def test_ranking_inside_the_layers_by_hand():
    shape = shape_of([2, 2], [2, 2])
    scores = ChannelScores(shape=shape, criterion="x", scores=(doubles(9, 8, 7, 6), doubles(1, 2, 3, 0)))
    keep = rank_in_layers(scores, weight_L=doubles(1, 1), prune_ratio=0.5, align=1)
    assert [keep_C.int().tolist() for keep_C in keep] == [[1, 1, 0, 0], [0, 1, 1, 0]]
    keep = rank_in_layers(scores, weight_L=doubles(3, 1), prune_ratio=0.5, align=1)
    assert [keep_C.int().tolist() for keep_C in keep] == [[1, 1, 1, 0], [0, 0, 1, 0]]
    assert all(bool(keep_C.all()) for keep_C in rank_in_layers(scores, weight_L=doubles(3, 1), prune_ratio=0.0))


def test_experts_of_a_layer_compete():
    shape = shape_of([4, 4], top_k=2)
    scores = ChannelScores(shape=shape, criterion="x", scores=(doubles(9, 8, 7, 6, 1, 1, 1, 1),))
    keep = rank_in_layers(scores, weight_L=doubles(1), prune_ratio=0.25, align=2)
    assert keep[0].int().tolist() == [1, 1, 1, 1, 1, 1, 0, 0]
    keep = rank_in_layers(scores, weight_L=doubles(1), prune_ratio=0.5, align=2)  # top-2 keeps a block of each
    assert keep[0].int().tolist() == [1, 1, 0, 0, 1, 1, 0, 0]


def test_global_layers_are_one_ranking():
    statistics = make_statistics(num_experts=16, num_layers=4)
    ranked = ChannelRanking(layers="global").plan(statistics, prune_ratio=0.5)
    exact = ExactGlobal(protect_super_experts=False).plan(statistics, prune_ratio=0.5)
    assert all(torch.equal(*keeps) for keeps in zip(ranked.keep, exact.keep, strict=True))


def test_layers_of_the_presets_by_hand():
    # Four layers of 8 experts of 32 channels, 64 blocks of 4 each; half stays: 128 blocks, 512 channels.
    statistics = make_statistics(num_layers=4)
    assert layer_sizes(build_method("wanda", align=4).plan(statistics, prune_ratio=0.5)) == [128] * 4
    # x^2 is 1, 1/9, 1/9, 1, mean 5/9: 1 + 0.5 * 4/9 and 1 - 0.5 * 4/9 of 32 blocks are 39.1 and 24.9.
    assert layer_sizes(build_method("u_shaped", align=4).plan(statistics, prune_ratio=0.5)) == [156, 100, 100, 156]


def test_shares_in_proportion_to_the_layer_loss():
    shape = shape_of([4] * 4, [4] * 4, [4] * 4)
    statistics = hand_statistics(shape, layers=[{"layer_energy": energy} for energy in (6.0, 1.0, 2.0)])
    # Half of 24 blocks of two: 6/9, 1/9, 2/9 of 12 are 8, 1.33 and 2.67.
    plan = build_method("loss_proportional", align=2).plan(statistics, prune_ratio=0.5)
    assert layer_sizes(plan) == [16, 2, 6]
    rooted = build_method("loss_proportional", align=2, smoothing="sqrt").plan(statistics, prune_ratio=0.5)
    assert layer_sizes(rooted) == [12, 4, 8]  # 2.45, 1, 1.41 of 4.86: 6.04, 2.47 and 3.49


@pytest.mark.parametrize("layers", ["uniform", "u_shaped", "loss_proportional", "global"])
@pytest.mark.parametrize("criterion", CHANNEL_CRITERIA)
def test_every_score_and_every_rule_meet_the_budget(layers, criterion):
    statistics = make_statistics(num_layers=3, num_experts=16, width=48, optional=True)
    plan = ChannelRanking(layers=layers, criterion=criterion).plan(statistics, prune_ratio=0.4)
    assert plan.num_kept == round(0.6 * statistics.shape.num_channels) // 16 * 16
    assert all(width % 16 == 0 for index in range(3) for width in plan.widths(index))
