"""The closed forms of the one-pass calibration against autograd and against real ablation, in float64."""

import pytest
import torch
from layer_reference import NoSharedExperts, RealLayer
from tiny_models import NUM_EXPERTS, WIDTH, random_tokens, tiny_model
from torch import Tensor

from lightning_moe.calibration.collector import collect_statistics
from lightning_moe.models.discovery import moe_layers

ALPHA = 0.9
LAYER = 1
# Normalised softmax, unnormalised softmax, sigmoid with a correction bias, groups, a residual multiplier.
CASES = (
    "qwen3_moe",
    "mixtral",
    "olmoe",
    "granitemoe",
    "qwen2_moe",
    "qwen2_moe_normalised",
    "deepseek_v2",
    "deepseek_v2_grouped",
    "deepseek_v3",
    "deepseek_v3_grouped",
    "glm4_moe",
    "ernie4_5_moe",
    "qwen3_next",
    "deepseek_v3 without shared experts",
    "qwen2_moe without shared experts",
)


def close(actual: Tensor, expected: Tensor) -> None:
    """1e-5 relative to each number; numbers a millionth of the largest are compared with that."""
    floor = 1e-6 * float(expected.abs().max())
    torch.testing.assert_close(actual, expected.double(), rtol=1e-5, atol=1e-5 * floor)


@pytest.fixture(scope="module", params=CASES)
def measured(request):
    name, _, without = request.param.partition(" without ")
    model = tiny_model(name, dtype=torch.float64)
    if without:
        for layer in moe_layers(model):
            layer.block.set_submodule(layer.family.shared_experts[0], NoSharedExperts())
    inputs = {"input_ids": random_tokens(batch=2, length=24)}
    sums = collect_statistics(model, loaders={"text": [inputs]}, progress=False).total()[LAYER]
    return sums, RealLayer(model, inputs, layer_index=LAYER)


def ones() -> Tensor:
    return torch.ones(NUM_EXPERTS, dtype=torch.float64)


def largest(value_SX: Tensor) -> Tensor:
    """Maximum over the rows, 0 for an expert that no token uses."""
    return torch.cat([value_SX.detach(), value_SX.new_zeros(1, value_SX.shape[1])]).amax(0)


def test_the_reference_layer_is_the_model(measured):
    _, real = measured
    torch.testing.assert_close(real.run(factor_E=ones()), real.output_TH, rtol=1e-12, atol=1e-12)


def test_layer_loss_and_attribution_equal_autograd(measured):
    sums, real = measured
    factor_E = ones().requires_grad_()
    loss = real.loss(real.run(factor_E=ALPHA * factor_E))
    (gradient_E,) = torch.autograd.grad(loss, factor_E)
    close((1 - ALPHA) ** 2 * sums["layer_energy"], loss.detach())
    close(2 * ALPHA * (1 - ALPHA) * sums["attribution"], -gradient_E)


def test_channel_saliency_equals_autograd(measured):
    sums, real = measured
    hidden: list[Tensor] = []

    def keep(_: int, h_Sn: Tensor) -> Tensor:
        hidden.append(h_Sn.detach().requires_grad_())
        return hidden[-1]

    loss = real.loss(real.run(factor_E=ALPHA * ones(), change_hidden=keep))
    gradients = torch.autograd.grad(loss, hidden)
    expected = torch.cat([(h * g).abs().sum(0) for h, g in zip(hidden, gradients, strict=True)]).detach()
    close(2 * ALPHA * (1 - ALPHA) * sums["channel_saliency"], expected)


def test_expert_ablation_equals_removing_the_expert(measured):
    sums, real = measured
    with torch.no_grad():
        expected = [real.loss(real.run(factor_E=ones().index_fill(0, torch.tensor([e]), 0.0))) for e in range(8)]
    close(sums["ablation"], torch.stack(expected))


@pytest.mark.parametrize("channel", [0, 13, WIDTH - 1])
def test_channel_ablation_equals_removing_the_channel(measured, channel):
    sums, real = measured
    expected = []
    for expert in range(NUM_EXPERTS):

        def remove(e: int, h_Sn: Tensor, *, expert: int = expert) -> Tensor:
            return h_Sn.index_fill(1, torch.tensor([channel]), 0.0) if e == expert else h_Sn

        with torch.no_grad():
            expected.append(real.loss(real.run(factor_E=ones(), change_hidden=remove)))
    down = real.layer.experts.down_proj.detach()
    norm_E = down[:, :, channel].square().sum(1)
    close(sums["channel_ablation"].view(NUM_EXPERTS, WIDTH)[:, channel] * norm_E, torch.stack(expected))


def test_every_other_sum_equals_its_definition(measured):
    sums, real = measured
    routed = real.routed()
    gates = [one.gate_S.double() for one in routed]
    norms = [one.z_SH.norm(dim=1) for one in routed]
    pairs = list(zip(routed, gates, norms, strict=True))
    expected = {
        "gate_sq": torch.cat([one.a_Sn.square().sum(0) for one in routed]),
        "up_sq": torch.cat([one.u_Sn.square().sum(0) for one in routed]),
        "hidden_sq": torch.cat([one.h_Sn.square().sum(0) for one in routed]),
        "weighted_sq": torch.cat([(one.h_Sn * gate[:, None]).square().sum(0) for one, gate, _ in pairs]),
        "max_weighted_sq": torch.cat([largest((one.h_Sn * gate[:, None]).square()) for one, gate, _ in pairs]),
        "weighted_norm": torch.stack([gate @ norm for _, gate, norm in pairs]),
        "norm": torch.stack([norm.sum() for norm in norms]),
        "sq_norm": torch.stack([norm.square().sum() for norm in norms]),
        "gate_weight": torch.stack([gate.sum() for gate in gates]),
        "count": torch.tensor([float(len(gate)) for gate in gates]),
        "max_abs": torch.stack([largest(one.z_SH.abs()).max() for one in routed]),
        "output_sum": torch.stack([one.z_SH.sum(0) for one in routed]),
        "output_sq": torch.stack([one.z_SH.square().sum(0) for one in routed]),
        "input_sq": torch.stack([real.hidden_TH[one.token_S].square().sum(0) for one in routed]),
    }
    for name, value in expected.items():
        close(sums[name], value.detach())
    assert float(sums["num_tokens"]) == 48


def test_output_gram_adds_up_to_the_routed_sum(measured):
    sums, real = measured
    dense_ETH = torch.zeros(NUM_EXPERTS, *real.hidden_TH.shape, dtype=torch.float64)
    for expert, one in enumerate(real.routed()):
        dense_ETH[expert, one.token_S] = (one.gate_S[:, None] * one.z_SH).detach()
    close(sums["output_gram"], torch.einsum("eth,fth->ef", dense_ETH, dense_ETH))


def test_attribution_adds_up_to_the_layer_energy(measured):
    sums, _ = measured
    close(sums["attribution"].sum(), sums["layer_energy"])


def test_router_probabilities_are_a_distribution_per_token(measured):
    sums, _ = measured
    assert float(sums["router_probability"].sum()) == pytest.approx(48, rel=1e-5)
    assert float(sums["entropy_histogram"].sum()) == 48
