"""Rankings against references in plain lists that try everything or sort everything: ties, floors, groups, costs."""

# E experts, C channels of a layer

import math
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations, pairwise, product

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from property_strategies import cases, generator_of, layer_shapes, model_shapes, needed_in_group, seeds
from torch import Tensor

from lightning_moe.allocation.alignment import Alignment, Demand, align_widths
from lightning_moe.allocation.coverage import cover
from lightning_moe.allocation.expert_subsets import drop_subsets
from lightning_moe.allocation.floors import Floors
from lightning_moe.allocation.global_ranking import rank_globally
from lightning_moe.records import ChannelScores, LayerShape, ModelShape

pytestmark = pytest.mark.property

RATIOS = st.floats(0.0, 0.99)
ALIGNS = st.sampled_from((1, 2, 3, 4, 8))


def whole_numbers(size: int, *, seed: int, most: int) -> Tensor:
    """Scores whose sums are exact, so that equals are equal in any order; a small `most` makes many of them."""
    return torch.randint(most + 1, (size,), generator=generator_of(seed)).double()


def scores_of(shape: ModelShape, *, seed: int, most: int) -> tuple[Tensor, ...]:
    return tuple(
        whole_numbers(layer.num_channels, seed=seed + index, most=most) for index, layer in enumerate(shape.layers)
    )


def group_of(layer: LayerShape, expert: int) -> int:
    return expert // (layer.num_experts // layer.num_groups)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a ranking has to respect."""

    align: int
    layer_floor: float = 0.0
    expert_floor: int = 0
    protected: tuple[Tensor, ...] | None = None
    costs: tuple[Tensor, ...] | None = None

    def floor(self, layer: int, expert: int) -> int:
        """Blocks that an expert keeps at least."""
        guarded = self.protected is not None and bool(self.protected[layer][expert])
        return -(-max(self.expert_floor, self.align if guarded else 0) // self.align)


def ranked_blocks(layer: LayerShape, score_C: Tensor, *, rules: Rules, index: int) -> list[tuple[float, int, int]]:
    """(score, expert, place) of every whole block, in the order of the channels."""
    blocks = []
    for expert, part in enumerate(score_C.split(layer.widths)):
        best = sorted(part.tolist(), reverse=True)
        cost = 1.0 if rules.costs is None else float(rules.costs[index][expert])
        for place in range(len(best) // rules.align):
            score = sum(best[place * rules.align : (place + 1) * rules.align])
            blocks.append((score / cost, expert, place))
    return blocks


def reserved_blocks(layer: LayerShape, blocks: list, *, rules: Rules, index: int) -> set | None:
    """Blocks that nobody may take; None where a router group cannot have what it needs."""
    reserved = set()
    for group in range(layer.num_groups):
        first = [one for one in blocks if one[2] == 0 and group_of(layer, one[1]) == group]
        first.sort(key=lambda one: (-one[0], one[1]))
        if len(first) < needed_in_group(layer):
            return None
        reserved |= set(first[: needed_in_group(layer)])
    reserved |= {one for one in blocks if one[2] < rules.floor(index, one[1])}
    rest = sorted((one for one in blocks if one not in reserved), key=lambda one: (-one[0], one[1], one[2]))
    lacking = math.ceil(rules.layer_floor * layer.num_channels / rules.align) - len(reserved)
    return reserved | set(rest[: max(lacking, 0)])


def naive_ranking(shape: ModelShape, scores: tuple[Tensor, ...], *, ratio: float, rules: Rules) -> list | None:
    """Kept channels per layer as sets, or None where the rules cannot be met."""
    every, reserved = [], set()
    for index, (layer, score_C) in enumerate(zip(shape.layers, scores, strict=True)):
        blocks = ranked_blocks(layer, score_C, rules=rules, index=index)
        own = reserved_blocks(layer, blocks, rules=rules, index=index)
        if own is None:
            return None
        every += [(index, *one) for one in blocks]
        reserved |= {(index, *one) for one in own}
    budget = round((1 - ratio) * shape.num_channels) // rules.align
    if not len(reserved) <= budget <= len(every):
        return None
    order = sorted(every, key=lambda one: (one not in reserved, -one[1], one[0], one[2], one[3]))
    return [kept_channels(layer, scores[i], order[:budget], rules, i) for i, layer in enumerate(shape.layers)]


def kept_channels(layer: LayerShape, score_C: Tensor, chosen: list, rules: Rules, index: int) -> set[int]:
    kept = set()
    for expert, first in enumerate(layer.offsets[:-1]):
        count = rules.align * sum(one[0] == index and one[2] == expert for one in chosen)
        channels = range(first, first + layer.widths[expert])
        kept |= set(sorted(channels, key=lambda c: (-float(score_C[c]), c))[:count])
    return kept


@st.composite
def rules_of(draw: st.DrawFn, shape: ModelShape) -> Rules:
    seed = draw(seeds)
    protected = costs = None
    if draw(st.booleans()):
        protected = tuple(whole_numbers(x.num_experts, seed=seed, most=3) > 2 for x in shape.layers)
    if draw(st.booleans()):  # powers of two, so that a quotient is exact
        costs = tuple(2.0 ** whole_numbers(x.num_experts, seed=seed, most=3) for x in shape.layers)
    return Rules(
        align=draw(ALIGNS),
        layer_floor=draw(st.sampled_from((0.0, 0.0, 0.1, 0.5, 1.0))),
        expert_floor=draw(st.sampled_from((0, 0, 1, 5))),
        protected=protected,
        costs=costs,
    )


@given(data=st.data(), shape=model_shapes(), ratio=RATIOS, seed=seeds, most=st.sampled_from((1, 5, 10**6)))
@cases(250)
def test_the_ranking_is_the_sorted_list(data, shape, ratio, seed, most):
    assume(ratio > 0)
    scores, rules = scores_of(shape, seed=seed, most=most), data.draw(rules_of(shape))
    expected = naive_ranking(shape, scores, ratio=ratio, rules=rules)
    floors = Floors(layer_floor=rules.layer_floor, expert_floor=rules.expert_floor, protected=rules.protected)
    ranking = ChannelScores(shape=shape, criterion="numbers", scores=scores)
    settings = {"prune_ratio": ratio, "align": rules.align, "floors": floors, "costs": rules.costs}
    if expected is None:
        with pytest.raises(ValueError, match="`align`"):
            rank_globally(ranking, **settings)
        return
    masks = rank_globally(ranking, **settings)
    assert [set(keep_C.nonzero().flatten().tolist()) for keep_C in masks] == expected


@st.composite
def groups_of_scores(draw: st.DrawFn) -> tuple[list[list[int]], list[int], list[int], int]:
    """Scores of each group, best first, weights, floors, and a budget between the floors and all."""
    groups = [
        sorted(draw(st.lists(st.integers(0, 6), min_size=1, max_size=6)), reverse=True)
        for _ in range(draw(st.integers(1, 4)))
    ]
    weights = [draw(st.integers(0, 4)) for _ in groups]
    floors = [draw(st.integers(0, len(group))) if draw(st.booleans()) else 0 for group in groups]
    return groups, weights, floors, draw(st.integers(sum(floors), sum(map(len, groups))))


def counts_between(groups: list, weights: list, floors: list, *, low: Fraction, high: Fraction) -> list[int]:
    """Smallest counts whose share of their group's sum reaches m times its weight, for any m inside (low, high]."""
    multiplier, counts = (low + high) / 2, []
    for group, weight, floor in zip(groups, weights, floors, strict=True):
        target = min(Fraction(1), multiplier * weight) * sum(group)
        fits = (count for count in range(len(group) + 1) if sum(group[:count]) >= target)
        counts.append(max(next(fits), floor))
    return counts


def covered_slowly(groups: list, weights: list, floors: list, budget: int) -> list[int]:
    """Algorithm 1 in fractions: every interval of the multiplier between two jumps, then one channel at a time."""
    weights = weights if any(weights) else [1] * len(weights)
    jumps = {Fraction(0)}
    for group, weight in zip(groups, weights, strict=True):
        jumps |= {Fraction(sum(group[:n]), sum(group) * weight) for n in range(len(group)) if sum(group) * weight}
        jumps |= {Fraction(1, weight)} if weight else set()
    ends = sorted(jumps)
    best = floors
    for low, high in pairwise([*ends, ends[-1] + 1]):
        counts = counts_between(groups, weights, floors, low=low, high=high)
        best = counts if sum(counts) <= budget else best
    best = list(best)
    while sum(best) < budget:
        room = [i for i, group in enumerate(groups) if best[i] < len(group)]
        best[max(room, key=lambda i: (groups[i][best[i]], -i))] += 1
    return best


@given(case=groups_of_scores())
@cases(300)
def test_coverage_is_that_of_every_multiplier(case):
    groups, weights, floors, budget = case
    counts = cover(
        [torch.tensor(group, dtype=torch.float64) for group in groups],
        weight_G=torch.tensor(weights, dtype=torch.float64),
        budget=budget,
        floor_G=torch.tensor(floors),
    )
    assert counts.tolist() == covered_slowly(groups, weights, floors, budget)


@given(layer=layer_shapes(), ratio=RATIOS, seed=seeds, most=st.sampled_from((1, 10)))
@cases(120)
def test_the_set_of_experts_is_the_best_of_all_sets(layer, ratio, seed, most):
    assume(ratio > 0)
    assume(len({width for width in layer.widths if width}) == 1)
    factor_EE = whole_numbers(layer.num_experts**2, seed=seed, most=most).view(layer.num_experts, -1)
    gram_EE = (factor_EE @ factor_EE.T).long().tolist()
    present = [expert for expert, width in enumerate(layer.widths) if width]
    num_kept = round((1 - ratio) * len(present))

    def error(kept) -> int:
        gone = [expert for expert in present if expert not in kept]
        return sum(gram_EE[i][j] for i, j in product(gone, gone))

    legal = [kept for kept in combinations(present, num_kept) if serves(layer, kept)]
    shape = ModelShape(model_type="tiny", hidden_size=4, layers=(layer,), router_digest="")
    grams = [torch.tensor(gram_EE, dtype=torch.float64)]
    if not legal:
        with pytest.raises(ValueError, match="must stay"):
            drop_subsets(shape, grams=grams, prune_ratio=ratio)
        return
    keep_C = drop_subsets(shape, grams=grams, prune_ratio=ratio)[0]
    kept = [expert for expert, part in enumerate(keep_C.split(layer.widths)) if bool(part.any())]
    assert tuple(kept) in legal
    assert error(kept) == min(map(error, legal))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_whether_a_set_is_refused_does_not_depend_on_the_order_of_its_experts(order):
    """All three must stay, and the two that matter most come nearest to three quarters of the channels."""
    layer = LayerShape(name="layers.0.experts", widths=tuple((1, 1, 3)[expert] for expert in order), top_k=3)
    shape = ModelShape(model_type="tiny", hidden_size=4, layers=(layer,), router_digest="")
    gram_EE = torch.tensor([(1.0, 1.0, 5.0)[expert] for expert in order], dtype=torch.float64).diag()
    with pytest.raises(ValueError, match="keeps 2 of 3 experts, but 3 must stay"):
        drop_subsets(shape, grams=[gram_EE], prune_ratio=0.25)


def legal_sets(layer: LayerShape, guarded: list, least: list, whole: list, *, num_blocks: int) -> list[tuple]:
    """Experts that can stay: all sets with the needed and guarded ones that hold the budget and are paid by it."""
    present = [expert for expert, most in enumerate(whole) if most]
    return [
        kept
        for count in range(len(present) + 1)
        for kept in combinations(present, count)
        if all(expert in kept for expert in present if guarded[expert])
        and sum(least[expert] for expert in kept) <= num_blocks <= sum(whole[expert] for expert in kept)
        and serves(layer, kept)
    ]


def serves(layer: LayerShape, kept: tuple) -> bool:
    counts = [sum(group_of(layer, expert) == group for expert in kept) for group in range(layer.num_groups)]
    return min(counts) >= needed_in_group(layer)


@given(data=st.data(), layer=layer_shapes(), seed=seeds)
@cases(200)
def test_aligned_widths_are_legal(data, layer, seed):
    """Budget exact, nobody between 0 and the smallest width, needed and guarded experts there; else none exist."""
    align, min_width = data.draw(ALIGNS), data.draw(st.sampled_from((1, 4, 8)))
    ideal = [data.draw(st.integers(0, width)) for width in layer.widths]
    guarded = [data.draw(st.sampled_from((0, 0, 0, 1, 9))) for _ in layer.widths]
    whole = [width // align for width in layer.widths]
    least = [min(-(-max(min_width, floor) // align), most) for floor, most in zip(guarded, whole, strict=True)]
    demand = Demand(
        ideal_E=torch.tensor(ideal),
        value_E=whole_numbers(layer.num_experts, seed=seed, most=3),
        floor_E=torch.tensor(guarded),
        num_blocks=data.draw(st.integers(0, sum(whole))),
    )
    try:
        widths = align_widths(layer, demand=demand, alignment=Alignment(align=align, min_width=min_width)).tolist()
    except ValueError:
        # Who stays is decided by preference, the guarded ones beside them: among equals no other choice does better.
        alike = (
            not any(guarded) and len({(most, fewest) for most, fewest in zip(whole, least, strict=True) if most}) == 1
        )
        assert not alike or not legal_sets(layer, guarded, least, whole, num_blocks=demand.num_blocks)
        return
    assert sum(widths) == align * demand.num_blocks
    for width, own_least, most, floor in zip(widths, least, whole, guarded, strict=True):
        assert width % align == 0
        assert width == 0 or align * own_least <= width <= align * most
        assert width > 0 or floor == 0 or most == 0
    assert serves(layer, tuple(expert for expert, width in enumerate(widths) if width))
