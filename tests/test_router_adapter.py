"""DoraRouter against a router whose weight is the dense DoRA weight, for every family."""

import copy

import pytest
import torch
from dora_reference import shake
from peft import LoraConfig
from tiny_models import FAMILY_NAMES, MODEL_NAMES, random_tokens, tiny_model
from torch import Tensor

from lightning_moe.adapters import AdapterConfig, DoraRouter, inject_adapters
from lightning_moe.models.discovery import moe_layers
from lightning_moe.models.routers import mask_router_rows, without_adapter
from lightning_moe.surgery.cut import convert_experts


def _adapted_router(name: str, *, use_dora: bool = True) -> DoraRouter:
    layer = moe_layers(tiny_model(name))[0]
    layer.router.requires_grad_(False)
    router = DoraRouter(layer.router, "default", LoraConfig(use_dora=use_dora), r=4, lora_alpha=8)
    shake(router)
    return router


def _dense_weight(router: DoraRouter) -> Tensor:
    """m (W + s B A) / ||W + s B A||, s = alpha / r = 2, written out row by row."""
    A, B = router.lora_A_router["default"], router.lora_B_router["default"]
    rows = []
    for row, b in zip(router.router.weight, B, strict=True):
        adapted = row + 2 * (b @ A)
        rows.append(adapted / adapted.detach().pow(2).sum().sqrt())
    return torch.stack(rows) * router.lora_magnitude_router["default"][:, None]


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_outputs_and_gradients_equal_a_router_with_the_dense_weight(name: str) -> None:
    router = _adapted_router(name)
    dense = copy.deepcopy(router.router)
    weight_EH = _dense_weight(router).detach()
    dense.weight.data = weight_EH
    hidden_TH = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    logits_TE, weights_TK, index_TK = router(hidden_TH)
    expected = dense(hidden_TH)
    torch.testing.assert_close(logits_TE, expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weights_TK, expected[1], rtol=1e-5, atol=1e-5)
    assert torch.equal(index_TK, expected[2])
    parameters = [p for p in router.parameters() if p.requires_grad]
    assert len(parameters) == 3
    mine = torch.autograd.grad(logits_TE.pow(2).sum(), parameters)
    theirs = torch.autograd.grad((hidden_TH @ _dense_weight(router).T).pow(2).sum(), parameters)
    for gradient, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-4)


def test_plain_lora_router() -> None:
    router = _adapted_router("qwen3_moe", use_dora=False)
    weight_EH = router.router.weight + 2 * router.lora_B_router["default"] @ router.lora_A_router["default"]
    torch.testing.assert_close(router.adapted_weight(), weight_EH)
    assert len(router.lora_magnitude_router) == 0


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_start_is_the_identity_and_disabling_gives_the_base(name: str) -> None:
    base = moe_layers(tiny_model(name))[0].router
    router = DoraRouter(base, "default", LoraConfig(use_dora=True), r=4, lora_alpha=8)
    hidden_TH = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    for mine, other in zip(router(hidden_TH), base(hidden_TH), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    shake(router)
    assert not torch.allclose(router(hidden_TH)[0], base(hidden_TH)[0], atol=1e-2)
    router.enable_adapters(False)
    for mine, other in zip(router(hidden_TH), base(hidden_TH), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("name", ["deepseek_v2_grouped", "deepseek_v3_grouped"])
def test_a_masked_expert_is_never_chosen(name: str) -> None:
    layer = moe_layers(tiny_model(name))[0]
    masked = mask_router_rows(layer.router, layer.family, [5])
    router = DoraRouter(masked, "default", LoraConfig(use_dora=True), r=4, lora_alpha=8)
    shake(router, scale=0.3)
    _, weights_TK, index_TK = router(torch.randn(200, 64, generator=torch.Generator().manual_seed(0)))
    assert 5 not in index_TK
    assert weights_TK.isfinite().all()


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_the_block_runs_and_its_router_stays_reachable(name: str) -> None:
    model = tiny_model(name)
    convert_experts(model)
    plain = moe_layers(model)[0].router
    peft_model = inject_adapters(model, config=AdapterConfig(expert_rank=0, router_rank=4))
    layer = moe_layers(peft_model.get_base_model())[0]
    assert isinstance(layer.router, DoraRouter)
    assert without_adapter(layer.router) is plain
    assert layer.router.weight is plain.weight
    assert not plain.weight.requires_grad
    assert peft_model(input_ids=random_tokens()).logits.isfinite().all()


def test_router_logits_are_recorded() -> None:
    model = tiny_model("qwen3_moe")
    convert_experts(model)
    peft_model = inject_adapters(model, config=AdapterConfig(router_rank=4, expert_rank=2))
    before = peft_model(input_ids=random_tokens(), output_router_logits=True)
    assert [tuple(logits.shape) for logits in before.router_logits] == [(32, 8), (32, 8)]
    shake(moe_layers(model)[0].router)
    after = peft_model(input_ids=random_tokens(), output_router_logits=True)
    assert not torch.allclose(after.router_logits[0], before.router_logits[0], atol=1e-2)


def test_bf16_router_computes_in_fp32() -> None:
    model = tiny_model("qwen3_moe", dtype=torch.bfloat16)
    router = DoraRouter(moe_layers(model)[0].router, "default", LoraConfig(use_dora=True), r=4, lora_alpha=8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits_TE, _, _ = router(torch.randn(4, 64).bfloat16())
    assert logits_TE.dtype == torch.float32
    assert {p.dtype for p in router.parameters() if p.requires_grad and p.shape[0] != 64} >= {torch.float32}


def test_errors() -> None:
    router = _adapted_router("qwen3_moe")
    with pytest.raises(ValueError, match=r"rank of a router adapter must be at least 1, got -1"):
        DoraRouter(router.router, "default", LoraConfig(), r=-1)
    with pytest.raises(ValueError, match=r"merge_adapters.*dequantises first"):
        router.merge()
    router.update_layer("second", 2, 4, LoraConfig(use_dora=True))
    router.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"Router adapters are used one at a time"):
        router(torch.randn(2, 64))
