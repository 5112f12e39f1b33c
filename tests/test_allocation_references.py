"""Allocation against slow references that share no code with it: exhaustive search, and plain loops."""

from itertools import product

import pytest
import torch
from statistics_factory import make_shape, make_statistics, shape_of

from lightning_moe.allocation import ExactGlobal, PaperA
from lightning_moe.allocation.alignment import Alignment, Demand, align_widths
from lightning_moe.allocation.floors import Floors
from lightning_moe.allocation.global_ranking import rank_globally
from lightning_moe.allocation.paper_a import cover_model
from lightning_moe.criteria import CHANNEL_CRITERIA, EXPERT_CRITERIA
from lightning_moe.records import ChannelScores


def random_scores(shape, *, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = tuple(torch.rand(layer.num_channels, generator=generator).double() for layer in shape.layers)
    return ChannelScores(shape=shape, criterion="random", scores=scores)


def best_kept_score(scores, *, num_blocks, align, layer_floor_blocks):
    """Largest kept score over all block counts that the rules allow, by trying every one of them."""
    prefix, limits = [], []
    for layer, score_C in zip(scores.shape.layers, scores.scores, strict=True):
        for part in score_C.split(layer.widths):
            ranked = sorted(part.tolist(), reverse=True)
            prefix.append([sum(ranked[: align * blocks]) for blocks in range(len(ranked) // align + 1)])
            limits.append(range(len(ranked) // align + 1))
    ends = [sum(layer.num_experts for layer in scores.shape.layers[:index]) for index in range(9)]
    best = 0.0
    for counts in product(*limits):
        legal = sum(counts) == num_blocks
        for index, layer in enumerate(scores.shape.layers):
            own = counts[ends[index] : ends[index] + layer.num_experts]
            legal = legal and sum(count > 0 for count in own) >= layer.top_k and sum(own) >= layer_floor_blocks
        if legal:
            best = max(best, sum(sums[count] for sums, count in zip(prefix, counts, strict=True)))
    return best


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("prune_ratio", "num_blocks"), [(0.25, 9), (0.5, 6), (0.66, 4)])
@pytest.mark.parametrize("floor", [0, 2])
def test_global_ranking_is_the_best_legal_choice(seed, prune_ratio, num_blocks, floor):
    # Two layers of two experts of three blocks; a floor of 2 blocks is a third of a layer's 12 channels.
    scores = random_scores(shape_of([6, 6], [6, 6], top_k=1 + seed % 2), seed=seed)
    masks = rank_globally(scores, prune_ratio=prune_ratio, align=2, floors=Floors(layer_floor=floor / 6))
    got = sum(float(score_C[keep_C].sum()) for score_C, keep_C in zip(scores.scores, masks, strict=True))
    best = best_kept_score(scores, num_blocks=num_blocks, align=2, layer_floor_blocks=floor)
    assert got == pytest.approx(best, rel=1e-12)


def redistribute_slowly(*, widths, ideal, value, num_blocks, align, min_width):
    """Eviction, floor, largest loss, most room: one block at a time, in dictionaries."""
    alive = {index: count for index, count in enumerate(ideal) if count >= min_width}
    blocks = {index: count // align for index, count in alive.items()}
    room = {index: widths[index] // align - blocks[index] for index in alive}
    lost = {index: alive[index] - blocks[index] * align for index in alive}
    free = num_blocks - sum(blocks.values())
    for index in sorted(alive, key=lambda index: (lost[index], room[index], value[index]), reverse=True):
        if free and lost[index] > 0 and room[index] > 0:
            blocks[index], room[index], free = blocks[index] + 1, room[index] - 1, free - 1
    while free:
        index = max(alive, key=lambda index: (room[index], value[index]))
        blocks[index], room[index], free = blocks[index] + 1, room[index] - 1, free - 1
    return [align * blocks.get(index, 0) for index in range(len(ideal))]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("align", "min_width"), [(2, 2), (8, 8), (8, 16), (16, 16)])
def test_redistribution_equals_the_slow_loop(seed, align, min_width):
    generator = torch.Generator().manual_seed(seed)
    shape = make_shape(num_layers=1, num_experts=12, width=64, top_k=2)
    ideal_E = torch.randint(0, 64, (12,), generator=generator)
    value_E = torch.rand(12, generator=generator).double()
    num_blocks = int(ideal_E.sum()) // align
    demand = Demand(ideal_E=ideal_E, value_E=value_E, floor_E=torch.zeros(12).long(), num_blocks=num_blocks)
    got = align_widths(shape.layers[0], demand=demand, alignment=Alignment(align=align, min_width=min_width))
    assert got.tolist() == redistribute_slowly(
        widths=[64] * 12,
        ideal=ideal_E.tolist(),
        value=value_E.tolist(),
        num_blocks=num_blocks,
        align=align,
        min_width=min_width,
    )


def test_cover_model_at_ratio_zero_keeps_everything():
    statistics = make_statistics(width=33)
    masks = cover_model(
        CHANNEL_CRITERIA["camera"](statistics),
        weights=EXPERT_CRITERIA["reap"](statistics),
        weight_L=torch.ones(2, dtype=torch.float64),
        prune_ratio=0.0,
        alignment=Alignment(),
    )
    assert all(bool(keep_C.all()) for keep_C in masks)


@pytest.mark.parametrize("method", [ExactGlobal(align=64), PaperA(align=64, min_width=64)])
@pytest.mark.parametrize("prune_ratio", [0.25, 0.5])
def test_real_widths(method, prune_ratio):
    # DeepSeek-16B's form: 64 experts of 1408 = 22 blocks of 64, top-6.
    plan = method.plan(
        make_statistics(num_layers=2, num_experts=64, width=1408, hidden=2048, top_k=6), prune_ratio=prune_ratio
    )
    assert plan.num_kept == (1 - prune_ratio) * 2 * 64 * 1408
    assert {width % 64 for index in range(2) for width in plan.widths(index)} == {0}
