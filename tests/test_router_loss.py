"""The load-balancing loss per layer: against transformers, by hand, with cut routers, and its gradients."""

import pytest
import torch
from dora_reference import shake
from random_plans import random_plan
from tiny_models import FAMILY_NAMES, MODEL_NAMES, random_tokens, tiny_model
from torch import nn
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from lightning_moe.adapters import AdapterConfig, DoraRouter, inject_adapters
from lightning_moe.models.discovery import moe_layers
from lightning_moe.models.router_logits import RouterOutput
from lightning_moe.surgery.cut import apply_plan, convert_experts
from lightning_moe.training.router_loss import RouterLogits, load_balancing_loss

TOKENS_BS = random_tokens(batch=3, length=16)
MASK_BS = torch.ones_like(TOKENS_BS)
MASK_BS[0, :5] = 0
MASK_BS[2, :11] = 0
# Softmax routers that choose the best logits, without groups or biases: what transformers' function assumes.
PLAIN = ("qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "granitemoe")


def routers_of(model, *, mask_BS=None):
    with RouterLogits(model) as routers:
        model(input_ids=TOKENS_BS, attention_mask=mask_BS)
    return routers.outputs


def output_of(logits_TE, *, top_k=2, score="softmax", masked_E=None):
    hidden_TE = logits_TE if masked_E is None else logits_TE.masked_fill(masked_E, float("-inf"))
    return RouterOutput(
        index=0,
        logits_TE=logits_TE,
        index_TK=hidden_TE.topk(top_k, dim=-1).indices,
        score=score,
        with_gradients=True,
        masked_E=masked_E,
    )


def random_logits(num_tokens=48, num_experts=8, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, num_experts, generator=generator)


def hooks_in(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("mask_BS", [None, MASK_BS], ids=["all", "padded"])
@pytest.mark.parametrize("name", PLAIN)
def test_each_layer_has_the_loss_that_transformers_gives_it(name, mask_BS):
    model = tiny_model(name)
    outputs = routers_of(model, mask_BS=mask_BS)
    expected = [load_balancing_loss_func((one.logits_TE,), 8, 2, attention_mask=mask_BS) for one in outputs]
    for one, loss in zip(outputs, expected, strict=True):
        mine = load_balancing_loss([one], attention_mask=mask_BS)
        torch.testing.assert_close(mine, loss, rtol=0, atol=1e-6)
    both = load_balancing_loss(outputs, attention_mask=mask_BS)
    torch.testing.assert_close(both, sum(expected) / 2, rtol=0, atol=1e-6)


def test_transformers_sees_the_same_logits():
    model = tiny_model()
    outputs = routers_of(model)
    stock = model(input_ids=TOKENS_BS, output_router_logits=True).router_logits
    assert len(outputs) == len(stock) == 2
    assert all(torch.equal(one.logits_TE, logits_TE) for one, logits_TE in zip(outputs, stock, strict=True))


def test_layers_cannot_make_up_for_each_other_as_in_transformers():
    # Layer 0 sends everything to expert 0, layer 1 to expert 1. Each: E f P = 2 * (1 * 1) = 2. Pooled: f = P = 1/2.
    sure = torch.tensor([[50.0, -50.0]] * 4)
    outputs = [output_of(sure, top_k=1), output_of(sure.flip(1), top_k=1)]
    assert load_balancing_loss(outputs).item() == pytest.approx(2.0)
    pooled = load_balancing_loss_func(tuple(one.logits_TE for one in outputs), 2, 1)
    assert pooled.item() == pytest.approx(1.0)


def test_by_hand():
    # P of each token: (1/4, 3/4) and (3/4, 1/4) and (1/4, 3/4): mean (5/12, 7/12); f = (1/3, 2/3).
    logits_TE = torch.tensor([[1.0, 3.0], [3.0, 1.0], [1.0, 3.0]]).log()
    expected = 2 * (1 / 3 * 5 / 12 + 2 / 3 * 7 / 12)
    assert load_balancing_loss([output_of(logits_TE, top_k=1)]).item() == pytest.approx(expected)
    # The third token is padding: P = (1/2, 1/2), f = (1/2, 1/2).
    mask_BS = torch.tensor([[1, 1, 0]])
    assert load_balancing_loss([output_of(logits_TE, top_k=1)], attention_mask=mask_BS).item() == pytest.approx(1.0)


def test_sigmoid_scores_are_divided_by_their_sum():
    # Sigmoids 1/2 and 1/4: P = (2/3, 1/3), f = (1, 0).
    logits_TE = torch.tensor([[0.0, -torch.tensor(3.0).log()]])
    assert load_balancing_loss([output_of(logits_TE, top_k=1, score="sigmoid")]).item() == pytest.approx(4 / 3)


def test_padding_only_is_no_loss():
    loss = load_balancing_loss([output_of(random_logits())], attention_mask=torch.zeros(3, 16))
    assert loss.item() == 0.0


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_masked_experts_are_as_good_as_removed(score):
    logits_TE = random_logits(num_experts=8)
    masked_E = torch.tensor([0, 1, 0, 0, 1, 0, 0, 0], dtype=torch.bool)
    left = load_balancing_loss([output_of(logits_TE[:, ~masked_E], score=score)])
    by_bias = load_balancing_loss([output_of(logits_TE, score=score, masked_E=masked_E)])
    by_logits = load_balancing_loss([output_of(logits_TE.masked_fill(masked_E, float("-inf")), score=score)])
    torch.testing.assert_close(by_bias, left)
    torch.testing.assert_close(by_logits, left)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_masked_experts_get_no_gradient_and_no_nan(score):
    logits_TE = random_logits().requires_grad_()
    masked_E = torch.arange(8) == 3
    load_balancing_loss([output_of(logits_TE, score=score, masked_E=masked_E)]).backward()
    assert logits_TE.grad.isfinite().all()
    assert logits_TE.grad[:, 3].count_nonzero() == 0
    assert logits_TE.grad.abs().max() > 0


@pytest.mark.parametrize("name", [*FAMILY_NAMES, "deepseek_v2_grouped", "deepseek_v3_grouped", "glm4_moe_grouped"])
def test_layers_with_different_expert_counts(name):
    """Cut routers: rows removed, or masked by bias or logits where experts are grouped."""
    groups = {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 2} if name.endswith("grouped") else {}
    model = tiny_model(name, **groups)
    apply_plan(model, plan=random_plan(model, evicted=[[0, 3], [5]]))
    outputs = routers_of(model, mask_BS=MASK_BS)
    assert [int((~one.evicted()).sum()) for one in outputs] == [6, 7]
    each = [load_balancing_loss([one], attention_mask=MASK_BS) for one in outputs]
    loss = load_balancing_loss(outputs, attention_mask=MASK_BS)
    torch.testing.assert_close(loss, sum(each) / 2)
    assert [one.probability().sum(-1).min().item() for one in outputs] == pytest.approx([1, 1])
    loss.backward()
    gradients = [layer.router.weight.grad for layer in moe_layers(model)]
    assert all(gradient.isfinite().all() and gradient.abs().max() > 0 for gradient in gradients)


def gradients_of_a_step(model, *, checkpointing):
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    with RouterLogits(model) as routers:
        loss = model(input_ids=TOKENS_BS, labels=TOKENS_BS).loss
    auxiliary = load_balancing_loss(routers.outputs)
    (loss + auxiliary).backward()
    assert len(routers.outputs) == 2
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_gradient_checkpointing_changes_no_gradient(name, adapted):
    plain, checkpointed = tiny_model(name), tiny_model(name)
    if adapted:
        for model in (plain, checkpointed):
            convert_experts(model)
            torch.manual_seed(0)
            inject_adapters(model, config=AdapterConfig())
    expected = gradients_of_a_step(plain, checkpointing=False)
    found = gradients_of_a_step(checkpointed, checkpointing=True)
    assert expected.keys() == found.keys()
    assert any("gate" in key or "router" in key for key in expected)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-5, atol=1e-7)


def test_reentrant_checkpointing_and_no_grad_are_refused():
    model = tiny_model()
    with torch.no_grad():
        outputs = routers_of(model)
        assert load_balancing_loss(outputs).isfinite()
    with pytest.raises(ValueError, match=r"ran without gradients, .* Use non-reentrant gradient checkpointing"):
        load_balancing_loss(outputs)


def test_the_logits_are_those_of_the_adapted_router():
    model = tiny_model()
    convert_experts(model)
    inject_adapters(model, config=AdapterConfig())
    layer = moe_layers(model)[0]
    assert isinstance(layer.router, DoraRouter)
    before = routers_of(model)[0]
    shake(layer.router)
    outputs = routers_of(model)
    assert not torch.equal(outputs[0].logits_TE, before.logits_TE)
    load_balancing_loss(outputs[:1]).backward()
    trained = [parameter for parameter in layer.router.parameters() if parameter.requires_grad]
    assert len(trained) == 3
    assert all(parameter.grad.abs().max() > 0 for parameter in trained)


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_every_family_is_collected_and_no_hook_stays(name):
    model = tiny_model(name)
    # transformers keeps hooks of its own for recorded outputs.
    before = hooks_in(model)
    outputs = routers_of(model)
    assert [one.logits_TE.shape for one in outputs] == [(48, 8)] * 2
    assert [one.index for one in outputs] == [0, 1]
    assert load_balancing_loss(outputs).item() > 0.9
    with pytest.raises(RuntimeError, match="in the middle"), RouterLogits(model):
        raise RuntimeError("in the middle")
    assert hooks_in(model) == before


def test_autocast_does_not_round_the_loss():
    output = output_of(random_logits())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = load_balancing_loss([output])
    assert torch.equal(loss, load_balancing_loss([output]))


def test_what_is_refused():
    model = tiny_model()
    with RouterLogits(model) as routers:
        pass
    with pytest.raises(ValueError, match=r"'model.layers.0.mlp.gate' did not run inside `with RouterLogits"):
        _ = routers.outputs
    with pytest.raises(ValueError, match=r"There are no router outputs\. Run the model inside"):
        load_balancing_loss([])
    with pytest.raises(ValueError, match=r"`attention_mask` has 3 tokens and the routers saw 48. Give the mask of the"):
        load_balancing_loss([output_of(random_logits())], attention_mask=torch.ones(1, 3))


def test_a_block_can_be_entered_again_and_keeps_the_last_pass():
    model = tiny_model()
    routers = RouterLogits(model)
    with routers:
        model(input_ids=TOKENS_BS[:1])
        model(input_ids=TOKENS_BS)
    assert routers.outputs[0].logits_TE.shape == (48, 8)
    with routers:
        pass
    with pytest.raises(ValueError, match="did not run inside"):
        _ = routers.outputs


def test_even_routing_gives_k():
    # Uniform probabilities: E * sum_e f_e / E = sum_e f_e = K, whatever is chosen.
    flat = nn.Parameter(torch.zeros(10, 6))
    assert load_balancing_loss([output_of(flat, top_k=3)]).item() == pytest.approx(3.0)
