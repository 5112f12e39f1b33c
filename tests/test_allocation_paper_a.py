from dataclasses import replace

import pytest
import torch
from statistics_factory import hand_statistics, make_statistics, shape_of

from lightning_moe.allocation import PaperA
from lightning_moe.allocation.alignment import Alignment
from lightning_moe.allocation.floors import Floors
from lightning_moe.allocation.paper_a import cover_model, layer_budgets
from lightning_moe.criteria import CHANNEL_CRITERIA, EXPERT_CRITERIA


def test_paper_a_by_hand():
    # One layer, budget 4 of 8. phi is proportional to 4 : 1, so the weights are 2 : 1 and the norms 1 everywhere:
    # N_0 = ceil(8 m) and N_1 = ceil(4 m) are 2 + 1 = 3 up to m = 0.25 and 3 + 2 = 5 just above it. The repair gives the
    # missing channel to expert 0, whose channels count four times as much.
    ones = dict.fromkeys(("gate_sq", "up_sq", "hidden_sq"), [1.0] * 8)
    statistics = hand_statistics(shape_of([4, 4]), layers=[ones | {"attribution": [4, 1]}])
    plan = PaperA(align=1, min_width=1).plan(statistics, prune_ratio=0.5)
    assert plan.widths(0) == (3, 1)


def test_negative_attribution_is_clamped():
    # Expert 1 hurts (negative phi). Unclamped, sqrt(phi) would be NaN and phi * score would turn its order around.
    statistics = hand_statistics(
        shape_of([4, 4, 4]),
        layers=[{"attribution": [5, -50, 3], "hidden_sq": [4, 3, 2, 1, 9, 4, 1, 16, 4, 3, 2, 1]}],
    )
    settings = {"align": 1, "min_width": 1, "protect_super_experts": False}
    assert PaperA(**settings).plan(statistics, prune_ratio=0.5).widths(0)[1] == 0
    floored = PaperA(expert_floor=2, **settings).plan(statistics, prune_ratio=0.5)
    # Kept by a floor, it still keeps its best channels by the channel score: 16 and 9.
    assert floored.keep[0][4:8].tolist() == [True, False, False, True]


def test_layer_without_positive_attribution_treats_its_experts_alike():
    statistics = hand_statistics(shape_of([4, 4]), layers=[{"attribution": [-1, -2]}])
    plan = PaperA(align=1, min_width=1, protect_super_experts=False).plan(statistics, prune_ratio=0.5)
    assert plan.num_kept == 4


def test_blocks_do_not_leak_between_layers():
    statistics = make_statistics(num_layers=4, num_experts=16)
    scores = CHANNEL_CRITERIA["activation_norm"](statistics)
    weight_L = torch.tensor([0.5, 1.0, 1.5, 1.0], dtype=torch.float64)
    block_L = layer_budgets(
        scores, weight_L=weight_L, prune_ratio=0.5, alignment=Alignment(align=8, min_width=16), floors=Floors()
    )
    masks = cover_model(
        scores,
        weights=EXPERT_CRITERIA["attribution"](statistics),
        weight_L=weight_L,
        prune_ratio=0.5,
        alignment=Alignment(align=8, min_width=16),
    )
    assert [int(keep_C.sum()) for keep_C in masks] == (8 * block_L).tolist()
    assert int(block_L.sum()) * 8 == statistics.shape.num_channels // 2
    assert int(block_L[0]) < int(block_L[2])


def test_layer_loss_decides_the_layers_budget():
    statistics = make_statistics(num_layers=2, num_experts=16)
    plans = {}
    for energy in (1.0, 100.0):
        layers = [dict(layer) for layer in statistics.corpora["text"]]
        layers[0]["layer_energy"] = torch.tensor(energy, dtype=torch.float64)
        layers[1]["layer_energy"] = torch.tensor(1.0, dtype=torch.float64)
        plans[energy] = PaperA().plan(replace(statistics, corpora={"text": tuple(layers)}), prune_ratio=0.5)
    assert sum(plans[100.0].widths(0)) > sum(plans[1.0].widths(0))


def test_alpha_leaves_the_plan_alone():
    statistics = make_statistics(num_experts=16)
    plans = [PaperA(alpha=alpha).plan(statistics, prune_ratio=0.5) for alpha in (0.5, 0.9)]
    assert all(torch.equal(a, b) for a, b in zip(plans[0].keep, plans[1].keep, strict=True))


@pytest.mark.parametrize("smoothing", ["sqrt4", "none", "sqrt", "log", "huber", "clip"])
def test_every_smoothing_meets_the_budget(smoothing):
    statistics = make_statistics(num_layers=5, num_experts=16)
    assert PaperA(smoothing=smoothing).plan(statistics, prune_ratio=0.4).num_kept == round(0.6 * 2560) // 16 * 16


def test_narrow_experts_are_evicted():
    plan = PaperA(min_width=24, align=8).plan(make_statistics(num_experts=16), prune_ratio=0.6)
    widths = [width for index in range(2) for width in plan.widths(index)]
    assert all(width == 0 or width >= 24 for width in widths)
    assert 0 in widths


def test_cover_model_checks_its_ratio():
    statistics = make_statistics()
    with pytest.raises(ValueError, match=r"`prune_ratio` must be in \[0, 1\), got 1"):
        cover_model(
            CHANNEL_CRITERIA["camera"](statistics),
            weights=EXPERT_CRITERIA["reap"](statistics),
            weight_L=torch.ones(2, dtype=torch.float64),
            prune_ratio=1,
            alignment=Alignment(),
        )
