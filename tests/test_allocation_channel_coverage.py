"""Corpora that take turns: in general, and with blocks of channels."""

from dataclasses import replace

import pytest
import torch
from statistics_factory import hand_statistics, make_shape, make_statistics, shape_of

from lightning_moe.allocation import ChannelCoverage, ExactGlobal
from lightning_moe.allocation.channel_coverage import cover_corpora, protect_blocks
from lightning_moe.allocation.corpora import corpus_scores, normalise, ordered_corpora
from lightning_moe.allocation.expert_coverage import take_turns
from lightning_moe.criteria import CHANNEL_CRITERIA
from lightning_moe.records import PrunePlan


def rows(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def random_rows(shape, *, num_corpora, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.rand(num_corpora, layer.num_channels, generator=generator, dtype=torch.float64) for layer in shape.layers
    ]


def louder(statistics, *, corpus, factor):
    """The same statistics with every sum of one corpus larger, as if its text were read that often."""
    layers = tuple({name: value * factor for name, value in layer.items()} for layer in statistics.corpora[corpus])
    return replace(statistics, corpora={**statistics.corpora, corpus: layers})


# --- turns ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_protected", "turns"),
    [
        (0, [0, 0, 0, 0]),
        (1, [1, 0, 0, 0]),  # the first corpus takes its 9
        (2, [2, 0, 1, 0]),  # the second finds its 7 taken and takes its 6
        (3, [3, 1, 2, 0]),  # then the 8 of the first
        (4, [4, 2, 3, 1]),
    ],
)
def test_turns_by_hand(num_protected, turns):
    score_KE = rows([9, 8, 1, 0], [7, 1, 6, 2])
    assert take_turns(score_KE, num_protected=num_protected).tolist() == turns


def test_a_corpus_without_use_for_anything_passes():
    assert take_turns(rows([3, 2, 1], [0, 0, 0]), num_protected=2).tolist() == [2, 1, 0]
    # Nobody wants the middle one: two of three turns are taken.
    assert take_turns(rows([1, 0, 0], [0, 0, 2]), num_protected=3).tolist() == [3, 0, 2]


def test_equals_go_by_index():
    assert take_turns(rows([1, 1, 1], [1, 1, 1]), num_protected=3).tolist() == [3, 2, 1]


# --- corpora made comparable ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("by", "first", "second"),
    [
        ("none", [1, 3], [4, 0]),
        ("tokens", [0.5, 1.5], [2, 0]),
        ("model", [1 / 8, 3 / 8], [4 / 8, 0]),
        ("layer", [1 / 4, 3 / 4], [1, 0]),
        ("layer_max", [1 / 3, 1], [1, 0]),
    ],
)
def test_normalisations_by_hand(by, first, second):
    got = normalise([rows(1, 3), rows(4, 0)], by=by, tokens=2.0)
    assert [score_N.tolist() for score_N in got] == [first, second]


def test_a_layer_without_scores_stays_at_zero():
    assert normalise([rows(0, 0)], by="layer", tokens=2.0)[0].tolist() == [0, 0]


def test_order_of_the_turns():
    statistics = make_statistics(corpora=("c", "a", "b"))
    statistics = louder(statistics, corpus="a", factor=2)
    assert ordered_corpora(statistics, corpora=None, order="given") == ["c", "a", "b"]
    assert ordered_corpora(statistics, corpora=["b", "c"], order="given") == ["b", "c"]
    assert ordered_corpora(statistics, corpora=None, order="name") == ["a", "b", "c"]
    assert ordered_corpora(statistics, corpora=None, order="tokens") == ["a", "c", "b"]
    with pytest.raises(ValueError, match="`corpora` must name some of"):
        ordered_corpora(statistics, corpora=["d"], order="given")


def test_rows_stand_in_the_order_of_the_corpora():
    statistics = make_statistics(corpora=("prose", "code"))
    got = corpus_scores(
        statistics, corpora=["code", "prose"], criterion=CHANNEL_CRITERIA["channel_ablation"], normalised_by="tokens"
    )
    alone = CHANNEL_CRITERIA["channel_ablation"](statistics, corpora=["code"]).scores[1] / 1000
    torch.testing.assert_close(got[1][0], alone)


# --- blocks of channels ---------------------------------------------------------------------------------------------

# One expert of six channels: the first corpus lives on the first four, the second on the last two.
SIX = [rows([9, 8, 7, 6, 0, 0], [0, 0, 0, 0, 3, 2])]


@pytest.mark.parametrize(
    ("protected_share", "kept"),
    [
        (0.0, [0, 1, 2, 3]),  # the sums are 9 8 7 6 3 2
        (0.5, [0, 1, 2, 3]),  # the first corpus protects 0 1; the best free block is 7 + 6
        (1.0, [0, 1, 4, 5]),  # then the second protects 4 5
    ],
)
def test_what_is_kept_need_not_be_the_head_of_a_ranking(protected_share, kept):
    settings = {"scores": SIX, "protected_share": protected_share, "prune_ratio": 1 / 3, "align": 2}
    assert cover_corpora(shape_of([6]), **settings)[0].nonzero().flatten().tolist() == kept


def test_blocks_are_what_is_still_free():
    # The first takes 0 and 2 of expert 0 (17); of what is left the second takes 1 and 3 there (8), not 6 of expert 1.
    scores = [rows([9, 1, 8, 1, 1, 1, 1, 1], [1, 7, 1, 1, 1, 1, 5, 1])]
    keep = protect_blocks(shape_of([4, 4]), scores=scores, num_blocks=2, align=2)
    assert keep[0].int().tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    third = protect_blocks(shape_of([4, 4]), scores=scores, num_blocks=3, align=2)
    assert third[0].int().tolist() == [1, 1, 1, 1, 1, 1, 0, 0]  # equals by index, for the first corpus


def slow_turns(shape, *, scores, num_blocks, align):
    """Every turn looks at every expert anew."""
    free = [torch.ones(layer.num_channels, dtype=torch.bool) for layer in shape.layers]
    turn = passed = 0
    while num_blocks and passed < len(scores[0]):
        best = (0.0, 0, torch.empty(0))
        for index, layer in enumerate(shape.layers):
            score_C = scores[index][turn % len(scores[0])]
            for start, end in zip(layer.offsets, layer.offsets[1:], strict=False):
                channels = [channel for channel in range(start, end) if free[index][channel]]
                block = sorted(channels, key=lambda channel: -float(score_C[channel]))[:align]
                value = sum(float(score_C[channel]) for channel in block)
                if len(block) == align and value > best[0] + 1e-12:
                    best = (value, index, torch.tensor(block))
        turn, passed = turn + 1, passed + 1
        if best[0] > 0:
            free[best[1]][best[2]] = False
            num_blocks, passed = num_blocks - 1, 0
    return [~own for own in free]


@pytest.mark.parametrize("align", [1, 3])
@pytest.mark.parametrize("num_blocks", [1, 7, 100])
def test_turns_against_the_slow_way(num_blocks, align):
    shape = shape_of([7, 0, 9], [3, 8, 2])
    scores = random_rows(shape, num_corpora=3)
    scores[0][1] = 0.0  # the second corpus has no use for the first layer
    got = protect_blocks(shape, scores=scores, num_blocks=num_blocks, align=align)
    slow = slow_turns(shape, scores=scores, num_blocks=num_blocks, align=align)
    assert [keep_C.tolist() for keep_C in got] == [keep_C.tolist() for keep_C in slow]


@pytest.mark.parametrize("align", [1, 4, 16])
@pytest.mark.parametrize("prune_ratio", [0.1, 0.5, 0.7])
@pytest.mark.parametrize("protected_share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("groups", [{}, {"top_k": 4, "num_groups": 4, "top_k_groups": 2}])
def test_the_budget_is_exact(align, prune_ratio, protected_share, groups):
    shape = make_shape(num_layers=3, num_experts=16, width=[33, 32, 16, 48] * 4, **groups)
    scores = random_rows(shape, num_corpora=4)
    keep = cover_corpora(shape, scores=scores, protected_share=protected_share, prune_ratio=prune_ratio, align=align)
    # The plan itself refuses what tokens cannot reach.
    plan = PrunePlan(shape=shape, method="x", prune_ratio=prune_ratio, align=align, keep=keep, provenance={})
    assert plan.num_kept == round((1 - prune_ratio) * shape.num_channels) // align * align
    assert all(width % align == 0 for index in range(3) for width in plan.widths(index))


@pytest.mark.parametrize("prune_ratio", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("protected_share", [0.0, 0.5, 1.0])
def test_one_corpus_is_exact_global(prune_ratio, protected_share):
    statistics = make_statistics(num_experts=16, num_layers=3)
    covered = ChannelCoverage(protected_share=protected_share).plan(statistics, prune_ratio=prune_ratio)
    ranked = ExactGlobal().plan(statistics, prune_ratio=prune_ratio)
    assert all(torch.equal(*keeps) for keeps in zip(covered.keep, ranked.keep, strict=True))


def test_nothing_protected_is_exact_global_of_the_sums():
    statistics = make_statistics(num_experts=16, corpora=("a", "b", "c"))
    covered = ChannelCoverage(protected_share=0.0, normalise="tokens").plan(statistics, prune_ratio=0.5)
    ranked = ExactGlobal().plan(statistics, prune_ratio=0.5)
    assert all(torch.equal(*keeps) for keeps in zip(covered.keep, ranked.keep, strict=True))


@pytest.mark.parametrize("by", ["model", "tokens"])
def test_a_corpus_of_more_text_does_not_drown_the_others(by):
    statistics = make_statistics(num_experts=16, corpora=("a", "b", "c"))
    loud = louder(statistics, corpus="b", factor=64)
    for share in (0.0, 0.5):
        method = ChannelCoverage(normalise=by, protected_share=share)
        assert all(
            torch.equal(*keeps)
            for keeps in zip(
                method.plan(statistics, prune_ratio=0.5).keep, method.plan(loud, prune_ratio=0.5).keep, strict=True
            )
        )
    pooled, drowned = (ExactGlobal().plan(own, prune_ratio=0.5) for own in (statistics, loud))
    assert pooled.num_kept == drowned.num_kept
    assert not torch.equal(pooled.keep[0], drowned.keep[0])


def test_floors_and_super_experts_come_before_the_corpora():
    layers = [
        {"channel_ablation": [9.0] * 6 + [0.0] * 2, "max_abs": [1, 1, 1, 500]},
        {"channel_ablation": [9.0] * 8, "max_abs": [1, 1, 1, 1]},
    ]
    statistics = hand_statistics(shape_of([2] * 4, [2] * 4), layers=layers)
    plan = ChannelCoverage(align=2, protected_share=1.0).plan(statistics, prune_ratio=0.5)
    assert (plan.widths(0)[3], plan.num_kept) == (2, 8)
    bare = ChannelCoverage(align=2, protected_share=1.0, protect_super_experts=False)
    assert bare.plan(statistics, prune_ratio=0.5).widths(0)[3] == 0
    floored = ChannelCoverage(align=2, layer_floor=0.5, expert_floor=1).plan(statistics, prune_ratio=0.0)
    assert floored.num_kept == 16
    with pytest.raises(ValueError, match=r"The budget is 4 blocks of `align`=2 channels, but 8 are reserved"):
        ChannelCoverage(align=2, expert_floor=1).plan(statistics, prune_ratio=0.5)
