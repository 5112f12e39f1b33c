"""Corners of surgery: what a cut reports, the thresholds of the repair at the very numbers, converting twice."""

import pytest
import torch
from adapted_cases import adapted_model
from family_cases import Case
from random_plans import random_plan
from tiny_models import tiny_model

from lightning_moe.models.discovery import moe_layers
from lightning_moe.surgery.cut import convert_experts, cut_layer
from lightning_moe.surgery.least_squares import RIDGES, refit_rows, repaired_down_rows


@pytest.mark.parametrize("family", ["qwen3_moe", "ernie4_5_moe", "deepseek_v3_grouped"])
def test_every_reported_parameter_is_a_selection_of_the_old_one(family):
    # The bias of Ernie's router has its experts in the second dimension.
    model = tiny_model(family)
    plan = random_plan(model) if family.endswith("grouped") else random_plan(model, evicted=((2,), (0, 7)))
    convert_experts(model)
    for layer in moe_layers(model):
        before = {id(parameter) for part in (layer.experts, layer.router) for parameter in part.parameters()}
        old_router = dict(layer.router.named_parameters())
        replaced = cut_layer(layer, keep_C=plan.keep[layer.index])
        for one in replaced:
            assert id(one.old) in before
            assert torch.equal(one.new, one.old.index_select(one.dim, one.index))
        changed = [name for name, parameter in layer.router.named_parameters() if old_router[name] is not parameter]
        reported = {id(one.new) for one in replaced}
        assert all(id(layer.router.get_parameter(name)) in reported for name in changed)
        assert bool(changed) != family.endswith("grouped")


def test_converting_again_leaves_adapted_experts_alone():
    model = adapted_model(Case(name="qwen3_moe"), packed=False)
    before = [layer.experts for layer in moe_layers(model)]
    convert_experts(model)
    assert all(layer.experts is experts for layer, experts in zip(moe_layers(model), before, strict=True))


def refitted(*, correlation, num_tokens, num_channels=2):
    """One kept and one lost channel of equal size; a share of `correlation^2` of the lost one can be stood in for."""
    half = torch.tensor([[1.0, correlation], [correlation, 1.0]], dtype=torch.float64)
    return refit_rows(
        kept_kH=torch.tensor([[1.0]], dtype=torch.float64),
        lost_dH=torch.tensor([[2.0]], dtype=torch.float64),
        half_a=half,
        half_b=half,
        num_tokens=num_tokens,
        num_channels=num_channels,
    )


@pytest.mark.parametrize(
    ("num_tokens", "share", "accepted"),
    [
        (8, 0.48, False),  # 1 / sqrt(4) = 0.5
        (8, 0.52, True),
        (200, 0.09, False),  # 1 / sqrt(100) = 0.1
        (200, 0.11, True),
        (2, 0.999, False),  # 1 / sqrt(1): all of it
    ],
)
def test_a_repair_must_gain_more_than_the_noise_of_its_tokens(num_tokens, share, accepted):
    one = refitted(correlation=share**0.5, num_tokens=num_tokens)
    assert (one.ridge is not None) == accepted
    # Of a lost row of 2 with a Gram of 1, both halves together: 8 before; what is accepted is what was promised.
    assert one.error_before == pytest.approx(8.0)
    assert one.error_after == pytest.approx(8 * (1 - share) if accepted else 8.0, rel=1e-3)
    assert one.down_rows.item() == pytest.approx(1 + 2 * share**0.5 if accepted else 1.0, rel=1e-3)


@pytest.mark.parametrize(("num_tokens", "ridge"), [(31, 0.1), (32, RIDGES[0]), (33, RIDGES[0])])
def test_as_many_tokens_as_channels_are_enough_for_the_smallest_ridge(num_tokens, ridge):
    assert refitted(correlation=0.99, num_tokens=num_tokens, num_channels=32).ridge == ridge


def test_scarce_are_fewer_tokens_than_the_expert_had_channels():
    # 40 channels that are always equal; one stays and can stand in for all. 39 tokens are too few for a small ridge.
    keep_n, half_nn = torch.arange(40) == 7, torch.full((40, 40), 50.0, dtype=torch.float64)
    down_nH = torch.ones(40, 3, dtype=torch.float64)
    few, enough = (
        repaired_down_rows(down_nH=down_nH, keep_n=keep_n, half_a=half_nn, half_b=half_nn, num_tokens=count)
        for count in (39, 40)
    )
    assert (few.ridge, enough.ridge) == (0.1, RIDGES[0])
    # 1 + 39 / (1 + ridge)
    assert few.down_rows.tolist() == [pytest.approx([1 + 39 / 1.1] * 3)]
    assert enough.down_rows.tolist() == [pytest.approx([1 + 39 / 1.0001] * 3)]
