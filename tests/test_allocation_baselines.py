"""Uniform widths, dropped experts, and the super experts that floors protect."""

import pytest
import torch
from statistics_factory import hand_statistics, make_shape, make_statistics, shape_of

from lightning_moe.allocation.expert_dropping import drop_experts
from lightning_moe.allocation.super_experts import super_experts
from lightning_moe.allocation.uniform import uniform_width
from lightning_moe.records import ChannelScores, ExpertScores


def channels(shape, *layers):
    scores = tuple(torch.tensor(layer, dtype=torch.float64) for layer in layers)
    return ChannelScores(shape=shape, criterion="by_hand", scores=scores)


def experts(shape, *layers):
    scores = tuple(torch.tensor(layer, dtype=torch.float64) for layer in layers)
    return ExpertScores(shape=shape, criterion="by_hand", scores=scores)


def flat(scores):
    generator = torch.Generator().manual_seed(1)
    return channels(scores, *[torch.rand(layer.num_channels, generator=generator).tolist() for layer in scores.layers])


def kept_experts(scores, *, prune_ratio):
    return [
        [index for index, part in enumerate(keep_C.split(layer.widths)) if bool(part.any())]
        for layer, keep_C in zip(scores.shape.layers, drop_experts(scores, prune_ratio=prune_ratio), strict=True)
    ]


# --- uniform widths -------------------------------------------------------------------------------------------------


def test_uniform_width_by_hand():
    # Half of 4 is 2 channels: the 9 and 7 of expert 0, the 5 and 4 of expert 1, however small the second's are.
    got = uniform_width(channels(shape_of([4, 4]), [9, 1, 7, 2, 0, 5, 4, 3]), prune_ratio=0.5, align=2)
    assert got[0].tolist() == [True, False, True, False, False, True, True, False]


@pytest.mark.parametrize(
    ("width", "align", "prune_ratio", "kept"),
    [
        (128, 16, 0.5, 64),  # 4 blocks exactly
        (128, 16, 0.25, 96),  # 6 blocks
        (128, 16, 0.3, 96),  # 89.6 / 16 = 5.6 -> 6 blocks
        (128, 16, 0.35, 80),  # 83.2 / 16 = 5.2 -> 5 blocks
        (128, 16, 0.99, 16),  # never less than one block
        (100, 16, 0.01, 96),  # 99 / 16 = 6.19 -> 6 whole blocks
        (100, 16, 0.001, 96),
        (1408, 64, 0.5, 704),  # 22 blocks -> 11
        (20, 20, 0.1, 20),  # one block is all there is
    ],
)
def test_uniform_width_is_rounded_to_a_block(width, align, prune_ratio, kept):
    shape = make_shape(num_experts=3, width=width)
    for keep_C, layer in zip(
        uniform_width(flat(shape), prune_ratio=prune_ratio, align=align), shape.layers, strict=True
    ):
        assert [int(part.sum()) for part in keep_C.split(layer.widths)] == [kept] * 3


def test_uniform_width_at_ratio_zero_keeps_partial_blocks():
    shape = make_shape(num_experts=3, width=100)
    assert all(bool(keep_C.all()) for keep_C in uniform_width(flat(shape), prune_ratio=0.0))


def test_uniform_width_is_nested():
    scores = flat(make_shape(width=64))
    lighter = torch.cat(uniform_width(scores, prune_ratio=0.25))
    harder = torch.cat(uniform_width(scores, prune_ratio=0.75))
    assert bool((lighter | ~harder).all())
    assert int(lighter.sum()) == 3 * int(harder.sum())


def test_uniform_width_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match=r"experts of one width, layers.1.experts has \[4, 8\], the model \[4, 8\]"):
        uniform_width(flat(shape_of([4, 4], [4, 8])), prune_ratio=0.5, align=2)
    with pytest.raises(ValueError, match=r"`align`=16 is wider than the experts, 8 channels. Choose a smaller one"):
        uniform_width(flat(shape_of([8, 8])), prune_ratio=0.5)
    with pytest.raises(ValueError, match=r"`prune_ratio` must be in \[0, 1\), got 1"):
        uniform_width(flat(shape_of([8, 8])), prune_ratio=1)
    with pytest.raises(ValueError, match="`align` must be a whole number >= 1, got 0"):
        uniform_width(flat(shape_of([8, 8])), prune_ratio=0.5, align=0)


# --- dropped experts ------------------------------------------------------------------------------------------------


def test_dropped_experts_by_hand():
    shape = shape_of([2, 2, 2, 2], [2, 2, 2, 2])
    scores = experts(shape, [1, 4, 2, 3], [9, 9, 0, 9])
    assert kept_experts(scores, prune_ratio=0.5) == [[1, 3], [0, 1]]  # equals by index
    assert kept_experts(scores, prune_ratio=0.25) == [[1, 2, 3], [0, 1, 3]]
    keep = drop_experts(scores, prune_ratio=0.5)
    assert keep[0].tolist() == [False, False, True, True, False, False, True, True]


def test_dropping_at_ratio_zero_keeps_everything():
    assert kept_experts(experts(shape_of([2, 2]), [0, 0]), prune_ratio=0.0) == [[0, 1]]


def test_every_group_keeps_its_share():
    # Two groups of four, both chosen, top 4: two experts each at least, although the second group scores lowest.
    shape = shape_of([1] * 8, top_k=4, num_groups=2, top_k_groups=2)
    scores = experts(shape, [9, 8, 7, 6, 1, 2, 3, 4])
    assert kept_experts(scores, prune_ratio=0.5) == [[0, 1, 6, 7]]
    assert kept_experts(scores, prune_ratio=0.375) == [[0, 1, 2, 6, 7]]


def test_dropping_again_counts_the_experts_that_are_there():
    scores = experts(shape_of([2, 0, 2, 2, 2]), [1, 9, 2, 3, 4])
    assert kept_experts(scores, prune_ratio=0.5) == [[3, 4]]


def test_too_few_experts_are_an_error():
    scores = experts(shape_of([2] * 4, top_k=3), [1, 2, 3, 4])
    with pytest.raises(ValueError, match=r"layers.0.experts: `prune_ratio`=0.5 keeps 2 of 4 experts, but 3 must stay"):
        drop_experts(scores, prune_ratio=0.5)
    with pytest.raises(ValueError, match=r"`prune_ratio` must be in \[0, 1\), got -1"):
        drop_experts(scores, prune_ratio=-1)


# --- super experts --------------------------------------------------------------------------------------------------


def test_super_expert_by_hand():
    # Of 8 values the 99.5 % quantile lies 0.965 of the way from the second largest to the largest: 2 + 0.965 * 98.
    shape = shape_of([1] * 4, [1] * 4)
    statistics = hand_statistics(shape, layers=[{"max_abs": [1, 1, 100, 1]}, {"max_abs": [1, 2, 1, 1]}])
    assert [super_E.tolist() for super_E in super_experts(statistics)] == [[False, False, True, False], [False] * 4]


def test_a_tenth_of_the_largest_is_asked_for_too():
    # 600 experts: the three largest are above the quantile (place 596 of 599), but 5 is below a tenth of 100.
    shape = shape_of([1] * 600)
    statistics = hand_statistics(shape, layers=[{"max_abs": [100, 50, 5] + [1] * 597}])
    assert super_experts(statistics)[0].nonzero().flatten().tolist() == [0, 1]


def test_equal_experts_are_not_super():
    assert not bool(super_experts(hand_statistics(shape_of([1, 1]), layers=[{}]))[0].any())


def test_super_experts_of_an_unknown_corpus_are_refused():
    with pytest.raises(ValueError, match="`corpora` must name some of"):
        super_experts(make_statistics(), corpora=["nowhere"])
