"""DoraExperts against stock PEFT DoRA on per-expert Linear layers, autograd, and itself after a cut."""

import pytest
import torch
from dora_reference import SIDES, PerExpertLinears, adapted, channel_experts, routed_input
from peft import LoraConfig
from torch import nn

from lightning_moe.adapters import DoraExperts, cut_dora_experts
from lightning_moe.adapters.functional import adapted_norm, adapted_weight, squared_norms

# Two experts of width 16, two of 48, one of 32, one of width 0 and one (index 6) that gets no token.
WIDTHS = [48, 16, 32, 0, 16, 48, 32]
HIT = [0, 1, 2, 4, 5]


@pytest.mark.parametrize("rank", [3, 8])
@pytest.mark.parametrize("use_dora", [True, False])
@pytest.mark.parametrize("packed", [False, True])
def test_outputs_and_all_gradients_equal_stock_peft(packed: bool, use_dora: bool, rank: int) -> None:
    experts = channel_experts(WIDTHS, packed=packed)
    layer = adapted(experts, rank=rank, use_dora=use_dora)
    reference = PerExpertLinears(layer)
    hidden_TH, index_TK, weights_TK = routed_input(40, experts, hit=HIT)
    ours, theirs = ([hidden_TH.clone().requires_grad_(), weights_TK.clone().requires_grad_()] for _ in range(2))
    output = layer(ours[0], index_TK, ours[1])
    expected = reference(theirs[0], index_TK, theirs[1])
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    target = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    ((output - target) ** 2).sum().backward()
    ((expected - target) ** 2).sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        _assert_relative(mine.grad, other.grad)
    for (expert, side), linear in reference.linears().items():
        mine = reference.sources(expert, side, gradient=True)
        others = [parameter.grad for parameter in reference.parameters_of(linear)]
        assert len(mine) == len(others) == (3 if use_dora else 2)
        for gradient, other in zip(mine, others, strict=True):
            if expert in HIT:
                _assert_relative(gradient, other)
            else:
                assert gradient.count_nonzero() == 0
    assert all(parameter.grad is None for parameter in experts.parameters())


def test_parameters_of_experts_without_tokens_get_zero_gradients_not_none() -> None:
    layer = adapted(channel_experts(WIDTHS))
    layer(*routed_input(4, layer.experts, hit=[1, 4])).sum().backward()
    parameters = layer.adapter_parameters("default")
    assert len(parameters) == 9
    assert all(parameter.grad is not None for parameter in parameters.values())
    assert parameters["lora_A_gate"].grad[layer.experts.slot_order.index(0)].count_nonzero() == 0


@pytest.mark.parametrize("packed", [False, True])
def test_a_new_adapter_is_the_identity(packed: bool) -> None:
    experts = channel_experts(WIDTHS, packed=packed)
    layer = DoraExperts(experts, "default", LoraConfig(use_dora=True), r=4, lora_alpha=8)
    inputs = routed_input(20, experts, hit=HIT)
    torch.testing.assert_close(layer(*inputs), experts(*inputs), rtol=1e-6, atol=1e-6)
    assert all(p.dtype == torch.float32 for p in layer.adapter_parameters("default").values())
    shapes = {name: tuple(p.shape) for name, p in layer.adapter_parameters("default").items()}
    assert shapes["lora_A_gate"] == (7, 4, 64)
    assert shapes["lora_B_up"] == (192, 4)
    assert shapes["lora_A_down"] == (192, 4)
    assert shapes["lora_B_down"] == (7, 64, 4)
    assert shapes["lora_magnitude_down"] == (7, 64)


def test_initial_down_and_gate_have_the_spread_of_pefts_kaiming() -> None:
    layer = DoraExperts(channel_experts([64, 16]), "default", LoraConfig(use_dora=True), r=32, lora_alpha=8)
    parameters = layer.adapter_parameters("default")
    # uniform in +-1/sqrt(inputs): inputs are H = 64 for gate, the expert's width for down
    assert 0.11 < parameters["lora_A_gate"].abs().max() <= 1 / 8
    start, stop = layer.experts.row_range(1)
    assert 0.22 < parameters["lora_A_down"][start:stop].abs().max() <= 1 / 4
    start, stop = layer.experts.row_range(0)
    assert 0.11 < parameters["lora_A_down"][start:stop].abs().max() <= 1 / 8


def test_disabled_adapter_is_the_base() -> None:
    layer = adapted(channel_experts(WIDTHS, packed=True))
    inputs = routed_input(20, layer.experts, hit=HIT)
    assert not torch.allclose(layer(*inputs), layer.experts(*inputs), atol=1e-2)
    layer.enable_adapters(False)
    assert torch.equal(layer(*inputs), layer.experts(*inputs))


def test_closed_form_norm_equals_the_dense_one() -> None:
    torch.manual_seed(0)
    weight_Goi, A, B = torch.randn(3, 16, 64), torch.randn(3, 4, 64), torch.randn(3, 16, 4)
    closed = adapted_norm(A @ weight_Goi.transpose(1, 2), A, B, weight_Goi.pow(2).sum(-1), 1.7)
    torch.testing.assert_close(closed, (weight_Goi + 1.7 * B @ A).norm(dim=-1), rtol=1e-5, atol=1e-5)


def test_layer_equals_autograd_of_the_dense_formula_in_float64() -> None:
    layer = adapted(channel_experts([16, 16, 48, 0])).double()
    hidden_TH, index_TK, weights_TK = routed_input(20, layer.experts, hit=[0, 1, 2])
    leaves = [hidden_TH.double().requires_grad_(), weights_TK.double().requires_grad_()]
    leaves += list(layer.adapter_parameters("default").values())
    output_TH = layer(leaves[0], index_TK, leaves[1])
    expected_TH = _dense_output(layer, leaves[0], index_TK, leaves[1])
    torch.testing.assert_close(output_TH, expected_TH, rtol=1e-12, atol=1e-12)
    grad_TH = torch.randn(output_TH.shape, dtype=torch.float64)
    mine, theirs = (torch.autograd.grad(output, leaves, grad_TH) for output in (output_TH, expected_TH))
    for gradient, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-10, atol=1e-10)


def test_squared_norms_by_hand() -> None:
    # Inputs (3, 4) and (0, 2): each output's column has 9 and 16 + 4 = 20.
    assert squared_norms(torch.tensor([[[3.0, 4.0], [0.0, 2.0]]])).tolist() == [[9.0, 20.0]]


def test_a_row_of_zeros_gives_zeros_and_finite_gradients() -> None:
    experts = channel_experts([16, 16])
    experts.projection("gate_proj").weight.data[3] = 0
    layer = DoraExperts(experts, "default", LoraConfig(use_dora=True), r=2, lora_alpha=4)
    output = layer(*routed_input(8, experts, hit=[0, 1]))
    output.sum().backward()
    assert output.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in layer.adapter_parameters("default").values())


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_autocast_gives_bf16_arithmetic_and_fp32_gradients(base_dtype: torch.dtype) -> None:
    experts = channel_experts([16, 32, 32])
    layer = adapted(experts)
    inputs = routed_input(16, experts, hit=[0, 1, 2])
    exact = layer(*inputs)
    experts.to(base_dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(*inputs)
    output.sum().backward()
    assert output.dtype == torch.float32
    assert _relative(output, exact) < 0.03
    assert {p.grad.dtype for p in layer.adapter_parameters("default").values()} == {torch.float32}


def test_small_magnitude_change_is_seen_in_bf16() -> None:
    # 1.001 is lost when a bf16 weight is scaled in bf16; packed rows are scaled before they are rounded.
    experts = channel_experts([64, 64], packed=True)
    layer = DoraExperts(experts, "default", LoraConfig(use_dora=True), r=2, lora_alpha=4)
    hidden_TH, index_TK, weights_TK = routed_input(64, experts, hit=[0, 1])
    before = layer(hidden_TH.bfloat16(), index_TK, weights_TK).float()
    layer.adapter_parameters("default")["lora_magnitude_down"].data *= 1.001
    after = layer(hidden_TH.bfloat16(), index_TK, weights_TK).float()
    gain = ((after * before).sum() / (before * before).sum()).item()
    assert gain == pytest.approx(1.001, abs=2e-4)


def test_base_norms_follow_a_loaded_base() -> None:
    layer = adapted(channel_experts([16, 32], seed=0))
    other = adapted(channel_experts([16, 32], seed=5), seed=9)
    inputs = routed_input(8, layer.experts, hit=[0, 1])
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(*inputs), other(*inputs))
    assert not list(layer.buffers())


@pytest.mark.parametrize("evict", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_cut_adapter_equals_the_masked_one(packed: bool, evict: bool) -> None:
    widths = [48, 16, 32, 16]
    experts = channel_experts(widths, packed=packed)
    layer = adapted(experts)
    keep_C = torch.rand(sum(widths), generator=torch.Generator().manual_seed(2)) < 0.6
    kept = [0, 2, 3] if evict else [0, 1, 2, 3]
    if evict:
        keep_C[48:64] = False
    hidden_TH, index_TK, weights_TK = routed_input(30, experts, hit=kept)
    expected = _masked_output(layer, keep_C, hidden_TH, index_TK, weights_TK)
    cut_dora_experts(layer, keep_C=keep_C, kept_experts=kept)
    renumbered = torch.tensor([kept.index(e) if e in kept else -1 for e in range(4)])[index_TK]
    torch.testing.assert_close(layer(hidden_TH, renumbered, weights_TK), expected, rtol=1e-4, atol=1e-5)
    assert layer.experts.widths == tuple(int(part.sum()) for e, part in enumerate(keep_C.split(widths)) if e in kept)
    assert all(parameter.requires_grad for parameter in layer.adapter_parameters("default").values())


def test_cut_under_a_masked_router_keeps_width_zero_experts() -> None:
    layer = adapted(channel_experts([16, 16, 32]))
    keep_C = torch.ones(64, dtype=torch.bool)
    keep_C[:16] = False
    cut_dora_experts(layer, keep_C=keep_C, kept_experts=[0, 1, 2])
    assert layer.experts.widths == (0, 16, 32)
    assert all(parameter.isfinite().all() for parameter in layer.adapter_parameters("default").values())


def test_no_tokens_give_no_output() -> None:
    layer = adapted(channel_experts([16, 32]))
    output = layer(torch.empty(0, 64), torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2))
    assert output.shape == (0, 64)


def test_merged_experts_equal_the_adapter() -> None:
    for use_dora in (True, False):
        layer = adapted(channel_experts(WIDTHS, packed=True), use_dora=use_dora)
        merged = layer.merged_experts(dtype=torch.float32)
        inputs = routed_input(20, layer.experts, hit=HIT)
        torch.testing.assert_close(merged(*inputs), layer(*inputs), rtol=1e-5, atol=1e-5)
        assert not merged.packed
        assert merged.widths == layer.experts.widths


def test_several_adapters_share_a_layer_one_at_a_time() -> None:
    layer = adapted(channel_experts([16, 32]))
    inputs = routed_input(8, layer.experts, hit=[0, 1])
    first = layer(*inputs)
    layer.update_layer("second", 2, 4, LoraConfig(use_dora=False))
    layer.set_adapter("second")
    torch.testing.assert_close(layer(*inputs), layer.experts(*inputs))
    assert {name for name, p in layer.named_parameters() if p.requires_grad and name.endswith(".default")} == set()
    layer.set_adapter("default")
    assert torch.equal(layer(*inputs), first)
    layer.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"one at a time, but \['default', 'second'\] are active"):
        layer(*inputs)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"rank of an expert adapter must be at least 1, got 0"):
        DoraExperts(channel_experts([16]), "default", LoraConfig(), r=0)
    layer = adapted(channel_experts([16, 16]))
    with pytest.raises(ValueError, match=r"merge_adapters.*dequantises first"):
        layer.merge()


def _masked_output(
    layer: DoraExperts, keep_C: torch.Tensor, hidden_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """The adapted layer with the cut channels' activations set to zero, expert by expert with dense weights."""
    merged = layer.merged_experts(dtype=torch.float32)
    output_TH = torch.zeros_like(hidden_TH)
    for expert, keep in enumerate(keep_C.split(merged.widths)):
        gate_nH, up_nH, down_nH = merged.expert_matrices(expert, dtype=torch.float32)
        token, position = torch.where(index_TK == expert)
        channels_Sn = nn.functional.silu(hidden_TH[token] @ gate_nH.T) * (hidden_TH[token] @ up_nH.T) * keep
        output_TH.index_add_(0, token, channels_Sn @ down_nH * weights_TK[token, position, None])
    return output_TH


def _dense_output(
    layer: DoraExperts, hidden_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """The adapted layer with dense adapted weights `[o, i]`, expert by expert; differentiable by autograd."""
    output_TH = torch.zeros_like(hidden_TH)
    for piece in layer.pieces():
        for g, slot in enumerate(piece.experts):
            matrices = {}
            for side in SIDES:
                weight_oi = layer.wide_weight(piece, side)[g].T
                A, B, m = (part[g] for part in piece.low_rank(side, layer.adapter_parameters("default")))
                matrices[side] = adapted_weight(weight_oi, A, B, m, layer.scaling["default"])
            token, position = torch.where(index_TK == layer.experts.slot_order[slot])
            gate_Sn, up_Sn = (hidden_TH[token] @ matrices[side].T for side in ("gate", "up"))
            output_SH = (layer.experts.act_fn(gate_Sn) * up_Sn) @ matrices["down"].T
            output_TH = output_TH.index_add(0, token, output_SH * weights_TK[token, position, None])
    return output_TH


def _relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    return ((value.float() - expected.float()).norm() / expected.float().norm()).item()


def _assert_relative(value: torch.Tensor, expected: torch.Tensor) -> None:
    assert _relative(value, expected) < 1e-5
