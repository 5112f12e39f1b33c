from itertools import pairwise

import pytest
import torch
from statistics_factory import make_shape, shape_of

from lightning_moe.allocation.budget import (
    block_budget,
    channel_budget,
    check_count,
    check_prune_ratio,
    round_to_blocks,
)
from lightning_moe.allocation.floors import Floors
from lightning_moe.allocation.global_ranking import layer_blocks, rank_globally
from lightning_moe.allocation.ranking import keep_top_channels, order_by, rank_within_experts
from lightning_moe.allocation.reachability import needed_per_group, reserve_experts
from lightning_moe.records import ChannelScores, LayerShape, PrunePlan

# Two layers of two experts of four channels. Blocks of two, best first:
# layer 0: expert 0 has 8 + 6 = 14 and 2 + 1 = 3, expert 1 has 5 + 5 = 10 and 4 + 3 = 7;
# layer 1: expert 0 has 2 and 2, expert 1 has 9 + 0 = 9 and 0.
TINY = [[8, 1, 6, 2, 5, 5, 4, 3], [1, 1, 1, 1, 9, 0, 0, 0]]


def doubles(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def scores_of(shape, *layers):
    return ChannelScores(shape=shape, criterion="by_hand", scores=tuple(doubles(*layer) for layer in layers))


def random_scores(shape, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = tuple(
        torch.randn(layer.num_channels, generator=generator, dtype=torch.float64).exp() for layer in shape.layers
    )
    return ChannelScores(shape=shape, criterion="random", scores=scores)


def kept(scores, **settings):
    """Kept flat channels per layer."""
    return [keep_C.nonzero().flatten().tolist() for keep_C in rank_globally(scores, **settings)]


def as_plan(scores, **settings):
    keep = rank_globally(scores, **settings)
    align, prune_ratio = settings.get("align", 16), settings["prune_ratio"]
    return PrunePlan(shape=scores.shape, method="x", prune_ratio=prune_ratio, align=align, keep=keep, provenance={})


# --- orders ---------------------------------------------------------------------------------------------------------


def test_order_by_several_keys():
    assert order_by(torch.tensor([1, 2, 2, 1]), doubles(5, 1, 3, 5)).tolist() == [2, 1, 0, 3]


def test_rank_within_experts_by_hand():
    # Expert 0: 3 1 2 -> places 0 2 1; expert 1 is empty; expert 2: 5 5 -> equals by index.
    assert rank_within_experts(doubles(3, 1, 2, 5, 5), widths=(3, 0, 2)).tolist() == [0, 2, 1, 0, 1]


def test_keep_top_channels_by_hand():
    keep_C = keep_top_channels(doubles(3, 1, 2, 5, 6), widths=(3, 0, 2), kept_E=torch.tensor([2, 0, 1]))
    assert keep_C.tolist() == [True, False, True, False, True]


def test_zero_scores_rank_before_padding():
    assert rank_within_experts(doubles(0, 0, 1, 1, 1), widths=(2, 3)).tolist() == [0, 1, 0, 1, 2]


# --- budgets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prune_ratio", "channels", "blocks"),
    # 2 layers x 3 experts x 32 = 192 channels; blocks of 16
    [(0.0, 192, 12), (0.5, 96, 6), (0.25, 144, 9), (0.3, 134, 8), (0.999, 0, 0)],
)
def test_budget_by_hand(prune_ratio, channels, blocks):
    shape = make_shape(num_experts=3)
    assert channel_budget(shape, prune_ratio=prune_ratio) == channels
    assert block_budget(shape, prune_ratio=prune_ratio, align=16) == blocks


def test_partial_blocks_are_not_counted():
    shape = shape_of([100, 100])
    # Six whole blocks of 16 each; 10 % of 200 leaves 180 = 11 blocks and 4 channels, 1 % would need 12.4 -> 12 blocks.
    assert block_budget(shape, prune_ratio=0.1, align=16) == 11
    assert block_budget(shape, prune_ratio=0.01, align=16) == 12
    # Blocks of 16 in 28 channels: one whole; 2 % of 56 leaves 55 = 3 blocks, the experts have 2.
    with pytest.raises(ValueError, match=r"`prune_ratio`=0.02 keeps 3 blocks .* widths \[28\] have only 2 whole ones"):
        block_budget(shape_of([28, 28]), prune_ratio=0.02, align=16)


@pytest.mark.parametrize("prune_ratio", [1.0, -0.1, 1.5, float("nan"), "0.5", True, None])
def test_ratio_out_of_range_is_refused(prune_ratio):
    with pytest.raises(ValueError, match=r"`prune_ratio` must be in \[0, 1\), got"):
        check_prune_ratio(prune_ratio)


@pytest.mark.parametrize("value", [0, -16, 1.5, True, "16"])
def test_bad_count_is_refused(value):
    with pytest.raises(ValueError, match=rf"`align` must be a whole number >= 1, got {value!r}"):
        check_count(value, name="align", lowest=1)


def test_bad_floors_are_refused():
    with pytest.raises(ValueError, match=r"`layer_floor` is a share .* got 1.2"):
        Floors(layer_floor=1.2)
    with pytest.raises(ValueError, match=r"`expert_floor` must be a whole number >= 0, got -1"):
        Floors(expert_floor=-1)


def test_layer_floor_is_rounded_up_to_blocks():
    # 0.3 * 96 = 28.8 channels -> 2 blocks of 16; all of 40 + 40 channels are 2 + 2 whole blocks.
    assert Floors(layer_floor=0.3).layer_blocks(make_shape(num_experts=3), align=16) == [2, 2]
    assert Floors(layer_floor=1.0).layer_blocks(shape_of([40, 40]), align=16) == [4]


def test_expert_floors_by_hand():
    guards = [torch.tensor([True, False]), torch.tensor([False, False])]
    floors = Floors(expert_floor=4, protected=guards).expert_channels(shape_of([8, 8], [8, 8]), least=16)
    assert [floor_E.tolist() for floor_E in floors] == [[16, 4], [4, 4]]
    assert [floor_E.tolist() for floor_E in Floors().expert_channels(shape_of([8, 8]), least=16)] == [[0, 0]]


def test_round_to_blocks_by_largest_remainder():
    # 35 + 21 + 24 = 80 = 5 blocks of 16: 2 1 1 with remainders 3 5 8, the last block goes to the third.
    channel_L, capacity_L = torch.tensor([35, 21, 24]), torch.tensor([9, 9, 9])
    assert round_to_blocks(channel_L, capacity_L=capacity_L, num_blocks=5, align=16).tolist() == [2, 1, 2]


def test_round_to_blocks_respects_capacity():
    # The third layer is full at one block: the next remainder takes it; with one more round the first gets another.
    channel_L = torch.tensor([35, 21, 24])
    capacity_L = torch.tensor([9, 2, 1])
    assert round_to_blocks(channel_L, capacity_L=capacity_L, num_blocks=5, align=16).tolist() == [2, 2, 1]
    assert round_to_blocks(channel_L, capacity_L=capacity_L, num_blocks=7, align=16).tolist() == [4, 2, 1]


# --- reachability ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("experts", "top_k", "groups", "chosen", "needed"),
    [
        (8, 3, 1, 1, 3),  # no groups: top_k
        (8, 4, 4, 2, 2),  # 4 / 2 = 2
        (8, 2, 4, 2, 2),  # 2 / 2 = 1, but a group is ranked by two experts
        (12, 5, 3, 2, 3),  # 5 / 2 rounded up
        (4, 2, 4, 2, 1),  # groups of one expert
    ],
)
def test_needed_per_group(experts, top_k, groups, chosen, needed):
    layer = LayerShape(name="l", widths=(1,) * experts, top_k=top_k, num_groups=groups, top_k_groups=chosen)
    assert needed_per_group(layer) == needed
    layer.check_reachable([1 if index % (experts // groups) < needed else 0 for index in range(experts)])


def test_reserved_experts_are_the_preferred_of_each_group():
    layer = LayerShape(name="l", widths=(1,) * 8, top_k=4, num_groups=2, top_k_groups=2)
    value_E = doubles(1, 4, 2, 3, 9, 9, 8, 7)
    everyone = torch.ones(8, dtype=torch.bool)
    assert reserve_experts(layer, preferences=(value_E,), available_E=everyone).nonzero().flatten().tolist() == [
        1, 3, 4, 5,
    ]  # fmt: skip
    without = everyone.clone()
    without[1] = False
    got = reserve_experts(layer, preferences=(value_E,), available_E=without)
    assert got.nonzero().flatten().tolist() == [2, 3, 4, 5]


def test_too_few_available_experts_are_an_error():
    layer = LayerShape(name="l", widths=(4, 4, 0), top_k=2)
    with pytest.raises(ValueError, match=r"l: 2 experts of router group 0 must keep a block .* only 1 have one"):
        reserve_experts(layer, preferences=(doubles(1, 2, 3),), available_E=torch.tensor([True, False, False]))


# --- the ranking ----------------------------------------------------------------------------------------------------


def test_layer_blocks_by_hand():
    blocks = layer_blocks(doubles(*TINY[0]), widths=(4, 4), align=2)
    assert blocks.score_B.tolist() == [14.0, 3.0, 10.0, 7.0]
    assert blocks.expert_B.tolist() == [0, 0, 1, 1]
    assert blocks.rank_B.tolist() == [0, 1, 0, 1]


def test_partial_rest_of_an_expert_is_no_block():
    blocks = layer_blocks(doubles(1, 9, 5, 7, 3), widths=(3, 0, 2), align=2)
    assert blocks.score_B.tolist() == [14.0, 10.0]  # 9 + 5 and 7 + 3; the 1 is left out
    assert blocks.expert_B.tolist() == [0, 2]


def test_half_of_the_tiny_model():
    # The four best blocks are 14, 10, 9, 7; the 9 takes channel 4 and the first of its equals, 5.
    assert kept(scores_of(shape_of([4, 4], [4, 4]), *TINY), prune_ratio=0.5, align=2) == [[0, 2, 4, 5, 6, 7], [4, 5]]


def test_top_k_experts_stay_in_every_layer():
    # Two blocks: 14 and 10 are best, but layer 1 must keep one expert, its best (9).
    scores = scores_of(shape_of([4, 4], [4, 4]), *TINY)
    assert kept(scores, prune_ratio=0.75, align=2) == [[0, 2], [4, 5]]
    # With top_k = 2 four of the four blocks are reserved, one for each expert.
    scores = scores_of(shape_of([4, 4], [4, 4], top_k=2), *TINY)
    assert kept(scores, prune_ratio=0.5, align=2) == [[0, 2, 4, 5], [0, 1, 4, 5]]


def test_layer_floor_by_hand():
    # Half of 8 channels = 2 blocks per layer: 14 and 10; 9 and the first 2.
    scores = scores_of(shape_of([4, 4], [4, 4]), *TINY)
    assert kept(scores, prune_ratio=0.5, align=2, floors=Floors(layer_floor=0.5)) == [[0, 2, 4, 5], [0, 1, 4, 5]]
    # A floor that is met anyway changes nothing.
    assert kept(scores, prune_ratio=0.5, align=2, floors=Floors(layer_floor=0.25)) == kept(
        scores, prune_ratio=0.5, align=2
    )


def test_expert_floor_by_hand():
    scores = scores_of(shape_of([4, 4], [4, 4]), *TINY)
    assert kept(scores, prune_ratio=0.5, align=2, floors=Floors(expert_floor=1)) == [[0, 2, 4, 5], [0, 1, 4, 5]]
    # 3 channels are 2 blocks: everything is reserved at ratio 0.1 (14 of 16 channels, 7 blocks): too much.
    with pytest.raises(ValueError, match="The budget is 7 blocks of `align`=2 channels, but 8 are reserved"):
        rank_globally(scores, prune_ratio=0.1, align=2, floors=Floors(expert_floor=3))


def test_protected_expert_keeps_a_block():
    scores = scores_of(shape_of([4, 4], [4, 4]), *TINY)
    protected = [torch.tensor([False, False]), torch.tensor([True, False])]
    # Reserved: 14 (layer 0), 9 (layer 1) and the protected 2; the last block is 10.
    assert kept(scores, prune_ratio=0.5, align=2, floors=Floors(protected=protected)) == [[0, 2, 4, 5], [0, 1, 4, 5]]


def test_unreachable_budget_names_layer_and_numbers():
    scores = scores_of(shape_of([4, 4], [4, 4], top_k=2), *TINY)
    message = (
        r"The budget is 2 blocks of `align`=2 channels, but 4 are reserved; layers.0.experts alone reserves 2 "
        r"\(top_k=2 experts"
    )
    with pytest.raises(ValueError, match=message):
        rank_globally(scores, prune_ratio=0.75, align=2)


def test_align_wider_than_the_experts_is_an_error():
    scores = scores_of(shape_of([4, 4]), TINY[0])
    with pytest.raises(ValueError, match=r"keeps 1 blocks of `align`=5 .* widths \[4\] have only 0 whole ones"):
        rank_globally(scores, prune_ratio=0.25, align=5)
    wide = scores_of(shape_of([4, 12], top_k=2), [1.0] * 16)
    with pytest.raises(ValueError, match=r"layers.0.experts: 2 experts of router group 0 must keep a block .* only 1"):
        rank_globally(wide, prune_ratio=0.5, align=8)


@pytest.mark.parametrize(("align", "width"), [(1, 32), (16, 32), (16, 33), (64, 32)])
def test_ratio_zero_keeps_everything_even_partial_blocks(align, width):
    scores = random_scores(make_shape(width=width))
    assert all(bool(keep_C.all()) for keep_C in rank_globally(scores, prune_ratio=0.0, align=align))


@pytest.mark.parametrize("align", [1, 2, 8, 16])
@pytest.mark.parametrize("prune_ratio", [0.01, 0.1, 0.25, 0.333, 0.5, 0.75, 0.85])
def test_budget_and_alignment_are_exact(prune_ratio, align):
    scores = random_scores(make_shape(num_layers=3, num_experts=16))
    plan = as_plan(scores, prune_ratio=prune_ratio, align=align)
    assert plan.num_kept == round((1 - prune_ratio) * 3 * 16 * 32) // align * align
    assert all(width % align == 0 for index in range(3) for width in plan.widths(index))


@pytest.mark.parametrize("groups", [(1, 1), (4, 2), (8, 4), (2, 1)])
def test_every_token_finds_its_experts(groups):
    shape = make_shape(num_experts=16, top_k=4, num_groups=groups[0], top_k_groups=groups[1])
    scores = random_scores(shape)
    # Make the last three quarters of the experts worthless: reachability must bring some of them back.
    poor = tuple(score * (torch.arange(512) < 128) for score in scores.scores)
    plan = as_plan(ChannelScores(shape=shape, criterion="poor", scores=poor), prune_ratio=0.5, align=16)
    for index, layer in enumerate(shape.layers):
        layer.check_reachable(plan.widths(index))
    assert plan.num_kept == 512


def test_an_expert_keeps_its_best_channels():
    scores = random_scores(make_shape())
    plan = as_plan(scores, prune_ratio=0.6, align=8)
    for score_C, keep_C, layer in zip(scores.scores, plan.keep, scores.shape.layers, strict=True):
        for score, keep in zip(score_C.split(layer.widths), keep_C.split(layer.widths), strict=True):
            if 0 < int(keep.sum()) < len(keep):
                assert float(score[keep].min()) >= float(score[~keep].max())


def test_without_blocks_it_is_one_sorted_list():
    scores = random_scores(make_shape(num_experts=4, top_k=1))
    keep = torch.cat(rank_globally(scores, prune_ratio=0.5, align=1))
    every = torch.cat(scores.scores)
    assert set(keep.nonzero().flatten().tolist()) == set(every.topk(len(every) // 2).indices.tolist())


def test_a_lighter_cut_keeps_all_that_a_harder_one_keeps():
    scores = random_scores(make_shape(num_layers=3, num_experts=16))
    ratios = [0.0, 0.1, 0.3, 0.5, 0.7, 0.85]
    settings = {"align": 8, "floors": Floors(layer_floor=0.1)}
    masks = [torch.cat(rank_globally(scores, prune_ratio=ratio, **settings)) for ratio in ratios]
    for lighter, harder in pairwise(masks):
        assert bool((lighter | ~harder).all())


def test_permuted_experts_and_channels_give_the_permuted_plan():
    scores = random_scores(make_shape(num_layers=1, num_experts=8))
    order_E = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    inner = torch.randperm(32, generator=torch.Generator().manual_seed(2))
    order_C = (order_E[:, None] * 32 + inner).flatten()
    turned = ChannelScores(shape=scores.shape, criterion="x", scores=(scores.scores[0][order_C],))
    before = rank_globally(scores, prune_ratio=0.55, align=8)[0]
    after = rank_globally(turned, prune_ratio=0.55, align=8)[0]
    assert torch.equal(after, before[order_C])


def test_ragged_and_masked_experts_can_be_cut_again():
    shape = shape_of([32, 0, 16, 48], [16, 16, 0, 64], top_k=2)
    plan = as_plan(random_scores(shape), prune_ratio=0.4, align=16)
    # round(0.6 * 192) = 115 channels = 7 blocks of 16
    assert plan.num_kept == 112
    assert plan.widths(0)[1] == 0
    assert plan.widths(1)[2] == 0
    assert 1 not in plan.evicted(0)
