"""Corners of criteria and allocation: ties, half counts, rounding below zero, experts that are gone; all by hand."""

import pytest
import torch
from statistics_factory import hand_statistics, shape_of

from lightning_moe.allocation import expert_subsets
from lightning_moe.allocation.alignment import Alignment, Demand, align_widths, fewest_blocks
from lightning_moe.allocation.channel_coverage import cover_corpora
from lightning_moe.allocation.expert_coverage import cover_experts
from lightning_moe.allocation.expert_dropping import drop_experts
from lightning_moe.allocation.expert_subsets import drop_subsets
from lightning_moe.allocation.search import largest_within
from lightning_moe.allocation.uniform import kept_width
from lightning_moe.criteria import EXPERT_CRITERIA
from lightning_moe.records import ExpertScores


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def expert_scores(shape, *values):
    return ExpertScores(shape=shape, criterion="by_hand", scores=(doubles(*values),))


def test_mone_takes_rounding_of_float32_sums_for_no_spread():
    # 0.1^2 = 0.01: one token, whose square was rounded up; two equal tokens, whose squares were rounded down.
    shape = shape_of([1, 1])
    values = {
        "output_sum": [[0.1, 0, 0, 0], [0.2, 0, 0, 0]],
        "output_sq": [[0.010000001, 0, 0, 0], [0.019999999, 0, 0, 0]],
        "count": [1, 2],
    }
    assert EXPERT_CRITERIA["mone"](hand_statistics(shape, layers=[values])).scores[0].tolist() == [0.0, 0.0]


def test_the_last_blocks_go_to_the_more_valuable_of_equal_rooms():
    demand = Demand(ideal_E=torch.tensor([4, 4]), value_E=doubles(1, 2), floor_E=torch.tensor([0, 0]), num_blocks=5)
    layer = shape_of([8, 8]).layers[0]
    assert align_widths(layer, demand=demand, alignment=Alignment(align=2, min_width=2)).tolist() == [4, 6]


def test_a_layer_needs_no_more_than_its_narrowest_experts():
    # An expert of 64 channels would keep 32, two blocks; the one of 16 has one block, and one expert is enough.
    layer, floor_E = shape_of([64, 16, 64]).layers[0], torch.tensor([0, 0, 0])
    assert fewest_blocks(layer, floor_E=floor_E, alignment=Alignment(align=16, min_width=32)) == 1


def test_a_protected_block_of_little_worth_stays_before_any_free_one():
    # Everybody likes expert 0 a little: 6 a channel, the most there is. Each corpus protects a single channel of 5 with
    # a worthless one beside it; of the two such blocks of expert 1, one is worth nothing once channels are sorted.
    everybody = [2.0, 2.0]
    score_KC = doubles(
        [*everybody, 5.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        [*everybody, 0.0, 0.0, 5.0, 0.0, 0.0, 0.0],
        [*everybody, 0.0, 0.0, 0.0, 0.0, 5.0, 0.0],
    )
    (keep_C,) = cover_corpora(shape_of([2, 4, 2]), scores=[score_KC], protected_share=1.0, prune_ratio=0.25, align=2)
    assert keep_C.int().tolist() == [0, 0, 1, 1, 1, 1, 1, 1]


def test_the_number_of_protected_blocks_is_rounded():
    # 0.9 of 3 blocks are 3: turns of the first, the second and the first corpus; rounded down, expert 3 would be kept.
    score_KC = doubles([5.0, 1.0, 0.0, 0.0], [0.0, 0.0, 5.0, 3.0])
    (keep_C,) = cover_corpora(shape_of([1] * 4), scores=[score_KC], protected_share=0.9, prune_ratio=0.25, align=1)
    assert keep_C.int().tolist() == [1, 1, 1, 0]


def test_an_expert_without_channels_takes_nobodys_turn():
    # Expert 0 is a novice: it is used most, but protecting it keeps nothing. The one place is of the first corpus.
    shape = shape_of([0, 4, 4, 4])
    utility_KE = doubles([9.0, 0.0, 0.0, 3.0], [0.0, 5.0, 4.0, 0.0])
    (keep_C,) = cover_experts(
        expert_scores(shape, *utility_KE.sum(0).tolist()),
        utilities=[utility_KE],
        tokens_K=doubles(1, 1),
        fill="sum",
        protected_share=0.5,
        protected_count=1,
        prune_ratio=0.6,
    )
    assert keep_C.view(3, 4).all(1).tolist() == [False, False, True]


@pytest.mark.parametrize(("num_experts", "kept"), [(3, 2), (5, 2), (7, 4)])
def test_half_an_expert_is_rounded_to_the_even_number(num_experts, kept):
    # 1.5, 2.5 and 3.5 experts
    shape = shape_of([2] * num_experts)
    (keep_C,) = drop_experts(expert_scores(shape, *range(num_experts)), prune_ratio=0.5)
    assert int(keep_C.sum()) == 2 * kept


def test_one_by_one_an_expert_adds_its_products_with_the_gone_ones_twice():
    # Expert 0 goes first (1). Then expert 1 would add 2 + 2 * 0.15 = 2.3 and expert 2 2.2: so expert 1 stays.
    gram_EE = doubles([1.0, 0.15, 0.0], [0.15, 2.0, 0.0], [0.0, 0.0, 2.2])
    (keep_C,) = drop_subsets(shape_of([1] * 3), grams=[gram_EE], prune_ratio=0.67, max_subsets=0)
    assert keep_C.int().tolist() == [0, 1, 0]


def test_the_best_set_may_come_after_the_first_thousands(monkeypatch):
    monkeypatch.setattr(expert_subsets, "_CHUNK", 2)
    gram_EE = doubles([3.0, 0.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 4.0])
    (keep_C,) = drop_subsets(shape_of([1] * 4), grams=[gram_EE], prune_ratio=0.25)
    assert keep_C.int().tolist() == [1, 1, 0, 1]


def test_a_uniform_width_is_never_rounded_up_to_a_block_that_is_not_there():
    # 27.72 of 28 channels are 1.73 blocks of 16, and an expert has one whole block.
    assert kept_width(28, prune_ratio=0.01, align=16) == 16


@pytest.mark.parametrize(("largest", "tries"), [(500, [1000, 500, 501]), (499, [1000, 500, 499])])
def test_a_first_guess_next_to_the_answer_saves_the_search(largest, tries):
    tried = []

    def excess(number):
        tried.append(number)
        return number - largest

    assert largest_within(excess, highest=1000, origin=-500.0, start=500) == (largest, largest + 1)
    assert tried == tries
