"""ChannelExperts against a naive loop and against the stock experts."""

# T tokens, K experts per token, E experts, n channels, H hidden

import pytest
import torch
from random_experts import HIDDEN, RAGGED, UNALIGNED, gradients, naive, packed_pair, random_experts, random_routing
from tiny_models import FAMILY_NAMES, MODEL_NAMES, tiny_model
from torch import Tensor

from lightning_moe.models.conversion import to_channel_experts
from lightning_moe.models.discovery import expert_matrices, moe_layers


@pytest.mark.parametrize("top_k", [1, 3, 8])
@pytest.mark.parametrize("widths", [RAGGED, UNALIGNED, (16,) * 8], ids=["ragged", "unaligned", "equal"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 5e-2)], ids=str
)
def test_forward_and_gradients_equal_the_naive_loop(widths, top_k, dtype, tolerance) -> None:
    experts = random_experts(widths, dtype=dtype)
    index_TK, weights_TK = random_routing(num_tokens=12, num_experts=8, top_k=top_k)
    hidden_TH = torch.randn(12, HIDDEN).to(dtype)
    parameters = list(experts.parameters())
    ours = gradients(lambda x, w: experts(x, index_TK, w), hidden_TH, weights_TK, parameters)
    expected = gradients(lambda x, w: naive(experts, x, index_TK, w), hidden_TH, weights_TK, parameters)
    for mine, reference in zip(ours, expected, strict=True):
        assert mine.dtype == reference.dtype
        scale = max(float(reference.abs().max()), 1.0)
        torch.testing.assert_close(mine, reference, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("seed", range(5))
def test_random_widths_with_experts_that_get_no_token(seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    widths = tuple(torch.randint(0, 20, (8,), generator=generator).tolist())
    experts = random_experts(widths, dtype=torch.float64)
    index_TK = torch.tensor([[0, 3], [3, 0], [3, 7]])
    weights_TK, hidden_TH = torch.rand(3, 2, dtype=torch.float64), torch.randn(3, HIDDEN, dtype=torch.float64)
    torch.testing.assert_close(
        experts(hidden_TH, index_TK, weights_TK), naive(experts, hidden_TH, index_TK, weights_TK)
    )


def test_no_tokens_give_no_output() -> None:
    output = random_experts(RAGGED)(torch.empty(0, HIDDEN), torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2))
    assert output.shape == (0, HIDDEN)


def test_an_expert_of_width_zero_adds_nothing() -> None:
    experts = random_experts((8, 0, 8))
    hidden_TH, ones = torch.randn(4, HIDDEN), torch.ones(4, 1)
    assert experts(hidden_TH, torch.full((4, 1), 1), ones).abs().max() == 0
    assert experts(hidden_TH, torch.full((4, 1), 2), ones).abs().max() > 0


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_full_width_equals_the_stock_experts(name) -> None:
    layer = moe_layers(tiny_model(name))[0]
    stock = layer.experts
    ours = to_channel_experts(stock)
    index_TK, weights_TK = random_routing(num_tokens=20, num_experts=8, top_k=2)
    hidden_TH = torch.randn(20, HIDDEN)
    parameters = [stock.get_parameter("gate_up_proj"), stock.get_parameter("down_proj")]
    expected = gradients(lambda x, w: stock(x, index_TK, w), hidden_TH, weights_TK, parameters)
    mine = gradients(lambda x, w: ours(x, index_TK, w), hidden_TH, weights_TK, list(ours.parameters()))
    for value, reference in zip(mine[:3], expected[:3], strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-6)
    gate_EnH, up_EnH = expected[3].chunk(2, dim=1)
    stacked = [gate_EnH, up_EnH, expected[4].transpose(1, 2)]
    for value, reference in zip(mine[3:], stacked, strict=True):
        torch.testing.assert_close(value, reference.reshape(-1, HIDDEN), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("with_grad", [True, False])
def test_bfloat16_equals_the_stock_experts_bit_for_bit(with_grad, weights_dtype) -> None:
    stock = moe_layers(tiny_model(dtype=torch.bfloat16))[0].experts
    index_TK, weights_TK = random_routing(num_tokens=20, num_experts=8, top_k=2)
    hidden_TH, weights_TK = torch.randn(20, HIDDEN, dtype=torch.bfloat16), weights_TK.to(weights_dtype)
    with torch.set_grad_enabled(with_grad):
        ours = to_channel_experts(stock)(hidden_TH, index_TK, weights_TK)
        assert torch.equal(ours, stock(hidden_TH, index_TK, weights_TK))


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_gate_function_is_the_stock_one(name) -> None:
    stock = moe_layers(tiny_model(name))[0].experts
    gate_up_Sn = torch.randn(10, 64)
    gate_Sn, up_Sn = gate_up_Sn.chunk(2, dim=-1)
    act_fn = to_channel_experts(stock).act_fn
    assert torch.equal(act_fn(gate_Sn) * up_Sn, stock._apply_gate(gate_up_Sn))
    flags = [stock.has_gate, stock.is_concatenated, stock.has_bias, stock.is_transposed, stock.has_post_expert_norm]
    assert flags == [True, True, False, False, False]


@pytest.mark.parametrize("kind", ["stock", "converted"])
def test_expert_matrices_are_the_rows_of_an_expert(kind) -> None:
    stock = moe_layers(tiny_model())[0].experts
    gate_up, down = stock.get_parameter("gate_up_proj")[3], stock.get_parameter("down_proj")[3]
    module = stock if kind == "stock" else to_channel_experts(stock)
    gate_nH, up_nH, down_nH = expert_matrices(module, 3, dtype=torch.float64)
    assert torch.equal(torch.cat([gate_nH, up_nH]), gate_up.double())
    assert torch.equal(down_nH, down.T.double())


def test_experts_of_equal_width_are_views_in_both_directions() -> None:
    experts = random_experts(RAGGED)
    weight = experts.projection("up_proj").get_parameter("weight")
    sizes = [group.num_rows for group in experts.groups]
    for group, load in zip(experts.groups, experts.projection("up_proj").blocks(sizes), strict=True):
        block_nH = load(0, group.num_rows, torch.float32)
        assert block_nH.data_ptr() == weight[group.first_row].data_ptr()
        assert len(block_nH) == group.num_rows
    assert [group.width for group in experts.groups] == [8, 16, 24, 32]
    assert [group.num_experts for group in experts.groups] == [2, 3, 2, 1]


def test_slots_are_the_position_in_storage() -> None:
    experts = random_experts((16, 0, 8, 16, 8))
    assert experts.slot_order == (1, 2, 4, 0, 3)
    assert experts.slots(torch.arange(5)).tolist() == [3, 0, 1, 4, 2]
    assert experts.slots(torch.tensor([[4, 0]])).tolist() == [[2, 3]]
    assert [experts.row_range(e) for e in range(5)] == [(16, 32), (0, 0), (0, 8), (32, 48), (8, 16)]
    assert experts.storage_order()[:16].tolist() == list(range(16, 32))
    assert sorted(experts.storage_order().tolist()) == list(range(48))


@pytest.mark.parametrize(
    ("num_tokens", "top_k"), [(1, 1), (2, 2), (40, 3), (5, 8)], ids=["one", "few hit", "most hit", "all"]
)
@pytest.mark.parametrize("widths", [RAGGED, UNALIGNED], ids=["ragged", "unaligned"])
def test_packed_equals_dequantised(widths, num_tokens, top_k) -> None:
    packed, dense = packed_pair(widths)
    index_TK, weights_TK = random_routing(num_tokens=num_tokens, num_experts=8, top_k=top_k)
    hidden_TH = torch.randn(num_tokens, HIDDEN)
    with torch.no_grad():
        torch.testing.assert_close(packed(hidden_TH, index_TK, weights_TK), dense(hidden_TH, index_TK, weights_TK))
    mine = gradients(lambda x, w: packed(x, index_TK, w), hidden_TH, weights_TK, [])
    expected = gradients(lambda x, w: dense(x, index_TK, w), hidden_TH, weights_TK, [])
    for value, reference in zip(mine, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-4, atol=1e-5)


def test_packed_weights_are_not_kept_for_backward() -> None:
    packed, dense = packed_pair(RAGGED)
    index_TK, weights_TK = random_routing(num_tokens=40, num_experts=8, top_k=3)
    saved: dict[bool, list[Tensor]] = {True: [], False: []}
    for experts in (packed, dense):
        with torch.autograd.graph.saved_tensors_hooks(lambda t, e=experts: saved[e.packed].append(t) or t, lambda t: t):
            experts(torch.randn(40, HIDDEN, requires_grad=True), index_TK, weights_TK)
    weights = [{t.untyped_storage().nbytes() for t in saved[key] if t.dim() == 3} for key in (True, False)]
    assert weights[0] == set()  # [G, n, H] weights: none when packed ...
    assert weights[1] != set()  # ... while the hook does see those of the dense experts


@pytest.mark.parametrize("packed", [False, True])
def test_autocast_computes_in_its_type_and_gives_gradients_back(packed) -> None:
    experts = packed_pair(UNALIGNED)[0 if packed else 1]
    index_TK, weights_TK = random_routing(num_tokens=30, num_experts=8, top_k=3)
    hidden_TH = torch.randn(30, HIDDEN, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = experts(hidden_TH, index_TK, weights_TK)
    output.sum().backward()
    expected = experts(hidden_TH.detach(), index_TK, weights_TK)
    assert output.dtype == torch.float32
    assert 0 < (output - expected).abs().max() < 0.05 * expected.abs().max()
    assert hidden_TH.grad is not None
    assert hidden_TH.grad.isfinite().all()


def test_repr_names_experts_channels_and_widths() -> None:
    assert random_experts((8, 16, 8)).extra_repr() == "num_experts=3, channels=32, distinct widths=[8, 16]"
