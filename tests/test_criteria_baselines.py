"""The baselines' criteria, each with its arithmetic; what optional statistics they ask for."""

from dataclasses import replace

import pytest
import torch
from layer_reference import RealLayer
from statistics_factory import hand_statistics, make_statistics, shape_of
from tiny_models import NUM_EXPERTS, WIDTH, random_tokens, tiny_model

from lightning_moe.calibration.collector import collect_statistics
from lightning_moe.criteria import CHANNEL_CRITERIA, EXPERT_CRITERIA
from lightning_moe.records.statistics import WEIGHT_NORMS

CRITERIA = CHANNEL_CRITERIA | EXPERT_CRITERIA


def score(name, shape, *, num_tokens=10, **values):
    """The score of the only layer, as a list."""
    return CRITERIA[name](hand_statistics(shape, layers=[values], num_tokens=num_tokens)).scores[0].tolist()


def test_router_weight_by_hand():
    # Over all tokens: 3 / 20 = 0.15, and 1 / 20 = 0.05 however few tokens the second one saw.
    assert score("router_weight", shape_of([1, 1]), num_tokens=20, gate_weight=[3, 1], count=[12, 1]) == [0.15, 0.05]


def test_router_probability_by_hand():
    # 4 / 8 = 0.5, 1 / 8 = 0.125; an expert never chosen has probability too: 3 / 8 = 0.375
    got = score("router_probability", shape_of([1, 1, 1]), num_tokens=8, router_probability=[4, 1, 3], count=[8, 1, 0])
    assert got == [0.5, 0.125, 0.375]


def test_man_and_msan_by_hand():
    # 6 / 3 = 2, 1 / 4 = 0.25; without tokens 0
    assert score("man", shape_of([1, 1, 1]), norm=[6, 1, 0], count=[3, 4, 0]) == [2.0, 0.25, 0.0]
    assert score("msan", shape_of([1, 1, 1]), sq_norm=[12, 1, 0], count=[3, 4, 0]) == [4.0, 0.25, 0.0]


def test_mone_by_hand():
    # Expert 0: outputs (1, 0, 0, 5), (3, 0, 0, 5), (5, 0, 0, 5): means 3 and 5, variance ((-2)^2 + 0 + 2^2) / 2 = 4, 0.
    # sqrt(4) * 5 / 10 = 1. Expert 1 saw one token, expert 2 none: nothing varies.
    # Expert 3: (0, 0, 0, 0) and (2, 2, 2, 2): variance 2 each, sqrt(8) * 2.5 / 10.
    got = score(
        "mone",
        shape_of([1, 1, 1, 1]),
        output_sum=[[9, 0, 0, 15], [7, 7, 7, 7], [0] * 4, [2, 2, 2, 2]],
        output_sq=[[35, 0, 0, 75], [49, 49, 49, 49], [0] * 4, [4, 4, 4, 4]],
        gate_weight=[5, 1, 0, 2.5],
        count=[3, 1, 0, 2],
    )
    assert got == pytest.approx([1.0, 0.0, 0.0, 8**0.5 / 4])


def test_aimer_by_hand():
    # Hidden 4, so 12 weights a channel. Expert 0, one channel, all weights +-2: squares 48, absolutes 24:
    # sqrt(48 * 12) / 24 = 1. Expert 1, two channels, one weight of 3 and zeros: sqrt(9 * 24) / 3 = sqrt(24).
    # Expert 2 is all zeros, expert 3 was cut to nothing.
    got = score(
        "aimer",
        shape_of([1, 2, 1, 0]),
        gate_sq_norm=[16, 9, 0, 0],
        up_sq_norm=[16, 0, 0, 0],
        down_sq_norm=[16, 0, 0, 0],
        gate_abs_sum=[8, 3, 0, 0],
        up_abs_sum=[8, 0, 0, 0],
        down_abs_sum=[8, 0, 0, 0],
    )
    assert got == pytest.approx([1.0, 24**0.5, 0.0, 0.0])


def test_wanda_by_hand():
    # 3 * sqrt(4) = 6; 0.5 * sqrt(9) = 1.5; a channel that no token reaches: 0
    assert score("wanda", shape_of([2, 1]), down_abs_sum=[3, 0.5, 7], hidden_sq=[4, 9, 0]) == [6.0, 1.5, 0.0]


def test_snip_and_taylor_by_hand():
    # |-3| = 3; squares are summed by the collector
    assert score("snip", shape_of([2]), loss_snip=[-3, 2]) == [3.0, 2.0]
    assert score("taylor", shape_of([2]), loss_taylor=[0.5, 4]) == [0.5, 4.0]


def test_snip_takes_the_size_after_summing_over_corpora():
    first = hand_statistics(shape_of([2]), layers=[{"loss_snip": [3, 1]}])
    second = hand_statistics(shape_of([2]), layers=[{"loss_snip": [-2, 1]}])
    both = replace(first, corpora={"a": first.corpora["text"], "b": second.corpora["text"]})
    # |3 - 2| = 1 and |1 + 1| = 2
    assert CRITERIA["snip"](both).scores[0].tolist() == [1.0, 2.0]


@pytest.fixture(scope="module")
def measured():
    model = tiny_model("olmoe", dtype=torch.float64)
    inputs = {"input_ids": random_tokens(batch=2, length=24)}
    real = RealLayer(model, inputs, layer_index=1)
    return collect_statistics(model, loaders={"text": [inputs]}, progress=False), real


def test_output_criteria_equal_their_definition_on_a_model(measured):
    statistics, real = measured
    got = {name: EXPERT_CRITERIA[name](statistics).scores[1] for name in ("man", "msan", "mone", "router_weight")}
    for expert, one in enumerate(real.routed()):
        output_PH = one.z_SH.detach()
        assert len(output_PH) > 1
        norm_P, gates = output_PH.norm(dim=1), float(one.gate_S.sum()) / 48
        assert float(got["man"][expert]) == pytest.approx(float(norm_P.mean()))
        assert float(got["msan"][expert]) == pytest.approx(float(norm_P.square().mean()))
        assert float(got["router_weight"][expert]) == pytest.approx(gates)
        spread = output_PH.std(dim=0, unbiased=True).norm()
        assert float(got["mone"][expert]) == pytest.approx(float(spread) * gates)


def test_weight_criteria_equal_their_definition_on_a_model(measured):
    statistics, real = measured
    aimer_E, wanda_C = EXPERT_CRITERIA["aimer"](statistics).scores[1], CHANNEL_CRITERIA["wanda"](statistics).scores[1]
    gate_up, down = real.layer.experts.gate_up_proj.detach(), real.layer.experts.down_proj.detach()
    for expert, one in enumerate(real.routed()):
        every = torch.cat([gate_up[expert].flatten(), down[expert].flatten()])
        assert float(aimer_E[expert]) == pytest.approx(float(every.square().mean().sqrt() / every.abs().mean()))
        by_weight_Hn = down[expert].abs() * one.h_Sn.detach().norm(dim=0)
        torch.testing.assert_close(wanda_C[expert * WIDTH : (expert + 1) * WIDTH], by_weight_Hn.sum(0))
    assert len(aimer_E) == NUM_EXPERTS


def test_aimer_ranks_a_peaked_expert_above_a_flat_one():
    flat = score("aimer", shape_of([1, 1]), **_weights([1, 1, 1, 1], [0.1, 0.1, 0.1, 3.7]))
    assert flat[0] == pytest.approx(1.0)
    assert flat[1] > 1.8
    normal = torch.randn(10**5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert float(normal.square().mean().sqrt() / normal.abs().mean()) == pytest.approx((torch.pi / 2) ** 0.5, rel=0.01)


def _weights(*rows):
    """Three equal matrices with one row of four weights for each expert."""
    squares, absolutes = [sum(w * w for w in row) for row in rows], [sum(map(abs, row)) for row in rows]
    sides = ("gate", "up", "down")
    return {f"{side}_sq_norm": squares for side in sides} | {f"{side}_abs_sum": absolutes for side in sides}


@pytest.mark.parametrize(
    ("name", "missing", "remedy"),
    [
        ("mone", "output_sum", "Calibrate again with `calibrate --moments true`"),
        ("snip", "loss_snip", "Calibrate again with `calibrate --gradients true`"),
        ("taylor", "loss_taylor", "Calibrate again with `calibrate --gradients true`"),
    ],
)
def test_a_missing_statistic_names_the_option(name, missing, remedy):
    with pytest.raises(ValueError, match=rf"Criterion '{name}' needs '{missing}', which these .* not hold. {remedy}"):
        CRITERIA[name](make_statistics())


@pytest.mark.parametrize(("name", "missing"), [("aimer", "gate_abs_sum"), ("wanda", "down_abs_sum")])
def test_statistics_of_an_older_version_are_to_be_taken_again(name, missing):
    statistics = make_statistics()
    old = replace(statistics, weights=tuple({k: layer[k] for k in WEIGHT_NORMS} for layer in statistics.weights))
    with pytest.raises(ValueError, match=rf"'{name}' needs '{missing}'.* An older version wrote them: calibrate again"):
        CRITERIA[name](old)
    assert len(CRITERIA["weight_norm"](old).scores) == 2
