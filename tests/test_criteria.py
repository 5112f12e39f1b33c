from dataclasses import replace

import pytest
import torch
from statistics_factory import hand_statistics, make_statistics, shape_of

from lightning_moe.criteria import CHANNEL_CRITERIA, EXPERT_CRITERIA
from lightning_moe.criteria.channel import channel_saliency
from lightning_moe.criteria.expert import attribution
from lightning_moe.criteria.perturbation import first_order_factor
from lightning_moe.criteria.scoring import score_channels, score_experts

EVERY_CRITERION = [*CHANNEL_CRITERIA.values(), *EXPERT_CRITERIA.values()]
EVERY_NAME = [*CHANNEL_CRITERIA, *EXPERT_CRITERIA]


def score(name, shape, **values):
    """The score of the only layer, as a list."""
    criterion = (CHANNEL_CRITERIA | EXPERT_CRITERIA)[name]
    return criterion(hand_statistics(shape, layers=[values])).scores[0].tolist()


def test_names_of_the_contract():
    assert set(CHANNEL_CRITERIA) == {
        "activation_norm",
        "channel_ablation",
        "channel_saliency",
        "weight_norm",
        "camera",
        "wanda",
        "snip",
        "taylor",
    }
    assert set(EXPERT_CRITERIA) == {
        "attribution",
        "ablation",
        "reap",
        "frequency",
        "router_weight",
        "router_probability",
        "man",
        "msan",
        "mone",
        "aimer",
    }


def test_channel_ablation_by_hand():
    # sum g^2 h^2 q times ||W_down||^2: 2 * 5 = 10, 3 * 0.5 = 1.5, 0 * 9 = 0
    got = score("channel_ablation", shape_of([2, 1]), channel_ablation=[2, 3, 0], down_sq_norm=[5, 0.5, 9])
    assert got == [10.0, 1.5, 0.0]


def test_channel_saliency_by_hand():
    # 2 * 0.9 * 0.1 = 0.18; 0.18 * 50 = 9, 0.18 * 100 = 18
    assert score("channel_saliency", shape_of([2]), channel_saliency=[50, 100]) == pytest.approx([9.0, 18.0])


def test_activation_norm_by_hand():
    # Channel 0: (sqrt 4 + sqrt 1 + sqrt 9) / 3 = (2 + 1 + 3) / 3 = 2; channel 1: (1 + 0 + 17) / 3 = 6; mean 4.
    got = score("activation_norm", shape_of([1, 1]), gate_sq=[4, 1], up_sq=[1, 0], hidden_sq=[9, 289])
    assert got == [0.5, 1.5]


def test_activation_norm_of_a_dead_layer_is_zero():
    dead = {name: [0, 0] for name in ("gate_sq", "up_sq", "hidden_sq")}
    assert score("activation_norm", shape_of([1, 1]), **dead) == [0.0, 0.0]


def test_camera_by_hand():
    # Channel 0: 2 * (0.1 * 30 + 0.9 * 10) = 2 * 12 = 24; channel 1: 1 * (0.1 * 10 + 0.9 * 0) = 1
    got = score("camera", shape_of([2]), weighted_sq=[30, 10], max_weighted_sq=[10, 0], down_sq_norm=[2, 1])
    assert got == pytest.approx([24.0, 1.0])


def test_weight_norm_by_hand():
    # sqrt(1 + 4 + 4) = 3; sqrt(0 + 9 + 16) = 5
    got = score("weight_norm", shape_of([2]), gate_sq_norm=[1, 0], up_sq_norm=[4, 9], down_sq_norm=[4, 16])
    assert got == [3.0, 5.0]


def test_attribution_by_hand_clamps_after_summing():
    # 0.18 * 50 = 9; a negative sum counts as 0
    assert score("attribution", shape_of([1, 1]), attribution=[50, -70]) == pytest.approx([9.0, 0.0])


def test_attribution_clamps_the_sum_over_corpora_not_each_corpus():
    statistics = hand_statistics(shape_of([1, 1]), layers=[{"attribution": [100, -10]}])
    second = hand_statistics(shape_of([1, 1]), layers=[{"attribution": [-50, 60]}])
    both = replace(statistics, corpora={"a": statistics.corpora["text"], "b": second.corpora["text"]})
    # 0.18 * (100 - 50) = 9 and 0.18 * (60 - 10) = 9; clamped corpus by corpus it would be 18 and 10.8.
    assert attribution(both).scores[0].tolist() == pytest.approx([9.0, 9.0])


def test_ablation_by_hand():
    assert score("ablation", shape_of([1, 1]), ablation=[0.25, 3]) == [0.25, 3.0]


def test_reap_by_hand():
    # 6 / 3 = 2; 1 / 4 = 0.25; an expert that saw no token scores 0, not NaN
    got = score("reap", shape_of([1, 1, 1]), weighted_norm=[6, 1, 0], count=[3, 4, 0])
    assert got == [2.0, 0.25, 0.0]


def test_frequency_by_hand():
    assert score("frequency", shape_of([1, 1]), count=[7, 2]) == [7.0, 2.0]


@pytest.mark.parametrize(("alpha", "factor"), [(0.9, 0.18), (0.5, 0.5), (0.75, 0.375)])
def test_first_order_factor(alpha, factor):
    assert first_order_factor(alpha=alpha) == pytest.approx(factor)


def test_first_order_factor_is_the_gradient_of_the_perturbed_loss():
    # L(parts) = ||sum alpha * part - R||^2 q, R fixed: autograd's |part' * dL/dpart'| at part' = alpha * part.
    part_PH = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float64)
    total_H, q, alpha = part_PH.sum(0), 0.3, 0.9
    scaled_PH = (alpha * part_PH).requires_grad_()
    ((scaled_PH.sum(0) - total_H) ** 2).sum().mul(q).backward()
    read_P = -(scaled_PH.grad * scaled_PH.detach()).sum(1)
    closed_P = first_order_factor(alpha=alpha) * (part_PH @ total_H) * q
    assert torch.allclose(read_P, closed_P, rtol=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.2, 1.5])
@pytest.mark.parametrize("criterion", [attribution, channel_saliency])
def test_alpha_outside_its_range_is_refused(criterion, alpha):
    with pytest.raises(ValueError, match=rf"`alpha` must be between 0 and 1, both excluded, got {alpha}"):
        criterion(make_statistics(), alpha=alpha)


def test_alpha_scales_attribution():
    statistics = make_statistics()
    half, default = attribution(statistics, alpha=0.5), attribution(statistics)
    assert torch.allclose(half.scores[0], default.scores[0] * 0.5 / 0.18)


@pytest.mark.parametrize("criterion", EVERY_CRITERION, ids=EVERY_NAME)
def test_unknown_corpus_is_refused(criterion):
    with pytest.raises(ValueError, match=r"`corpora` must name some of \['text'\].* got \['code'\]"):
        criterion(make_statistics(optional=True), corpora=["code"])


@pytest.mark.parametrize("score_all", [score_channels, score_experts])
def test_a_formula_that_reads_what_was_not_gathered_is_told_what_was(score_all):
    match = r"Criterion 'mine' reads 'hiden_sq', which these statistics do not hold. Sums: .* hidden_sq,.*down_sq_norm"
    with pytest.raises(ValueError, match=match):
        score_all(make_statistics(), criterion="mine", corpora=None, formula=lambda sums, weights: sums["hiden_sq"])


@pytest.mark.parametrize(("name", "criterion"), zip(EVERY_NAME, EVERY_CRITERION, strict=True), ids=EVERY_NAME)
def test_score_carries_its_name_and_shape(name, criterion):
    statistics = make_statistics(num_layers=3, num_experts=4, width=(5, 0, 7, 2), optional=True)
    scores = criterion(statistics)
    assert scores.criterion == name
    assert scores.shape == statistics.shape
    sizes = {len(score) for score in scores.scores}
    assert sizes == ({14} if name in CHANNEL_CRITERIA else {4})


@pytest.mark.parametrize("criterion", EVERY_CRITERION, ids=EVERY_NAME)
def test_corpora_weigh_by_their_tokens(criterion):
    # One corpus twice under two names gives the order of the corpus alone: sums double, means and maxima stay.
    statistics = make_statistics(optional=True)
    twice = replace(statistics, corpora={"a": statistics.corpora["text"], "b": statistics.corpora["text"]})
    alone, both = criterion(statistics).scores[0], criterion(twice).scores[0]
    assert torch.equal(criterion(twice, corpora=["a"]).scores[0], alone)
    if criterion is not CHANNEL_CRITERIA["camera"]:
        assert torch.equal(both.argsort(stable=True), alone.argsort(stable=True))


@pytest.mark.parametrize("criterion", EVERY_CRITERION, ids=EVERY_NAME)
def test_permuted_experts_give_permuted_scores(criterion):
    statistics = make_statistics(num_layers=1, num_experts=4, width=3, optional=True)
    order_E = torch.tensor([2, 0, 3, 1])
    order_C = (order_E[:, None] * 3 + torch.arange(3)).flatten()
    orders = {4: order_E, 12: order_C}

    def permuted(values):
        return {name: value[orders[len(value)]] if value.dim() and len(value) in orders else value
                for name, value in values.items()}  # fmt: skip

    turned = replace(
        statistics,
        corpora={"text": tuple(permuted(layer) for layer in statistics.corpora["text"])},
        weights=tuple(permuted(layer) for layer in statistics.weights),
    )
    before, after = criterion(statistics).scores[0], criterion(turned).scores[0]
    assert torch.allclose(after, before[orders[len(before)]], rtol=1e-12)
