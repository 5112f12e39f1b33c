"""ChannelExperts against a naive loop and against the stock experts."""

# T tokens, K experts per token, E experts, n channels, H hidden

from collections.abc import Callable

import pytest
import torch
from tiny_models import FAMILY_NAMES, MODEL_NAMES, tiny_model
from torch import Tensor, nn

from lightning_moe.models.channel_experts import PROJECTIONS, ChannelExperts
from lightning_moe.models.discovery import expert_matrices, moe_layers
from lightning_moe.models.grouped import grouped_matmul, grouped_outer
from lightning_moe.quantization.nf4 import pack_experts, unpack_experts
from lightning_moe.surgery.cut import to_channel_experts

HIDDEN = 64
RAGGED = (16, 8, 24, 16, 8, 16, 32, 24)
UNALIGNED = (5, 7, 7, 12, 5, 0, 1, 7)


def random_experts(widths: tuple[int, ...], *, dtype: torch.dtype = torch.float32, seed: int = 0) -> ChannelExperts:
    torch.manual_seed(seed)
    experts = ChannelExperts(widths=widths, hidden_size=HIDDEN, act_fn=nn.SiLU())
    for name in PROJECTIONS:
        experts.projection(name).get_parameter("weight").data.normal_(std=0.2)
    return experts.to(dtype)


def random_routing(*, num_tokens: int, num_experts: int, top_k: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    index_TK = torch.rand(num_tokens, num_experts, generator=generator).topk(top_k, dim=-1).indices
    return index_TK, torch.rand(num_tokens, top_k, generator=generator)


def naive(experts: ChannelExperts, hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Token by token and expert by expert, straight from the definition."""
    rows = []
    for token, (experts_K, weights_K) in enumerate(zip(index_TK.tolist(), weights_TK, strict=True)):
        total = torch.zeros_like(hidden_TH[token])
        for expert, weight in zip(experts_K, weights_K, strict=True):
            gate_nH, up_nH, down_nH = experts.expert_matrices(expert, dtype=hidden_TH.dtype)
            channel_n = experts.act_fn(gate_nH @ hidden_TH[token]) * (up_nH @ hidden_TH[token])
            total = total + weight.to(hidden_TH.dtype) * (channel_n @ down_nH)
        rows.append(total)
    return torch.stack(rows)


def gradients(
    function: Callable[[Tensor, Tensor], Tensor], hidden_TH: Tensor, weights_TK: Tensor, parameters: list[nn.Parameter]
) -> list[Tensor]:
    inputs = [hidden_TH.clone().requires_grad_(), weights_TK.clone().requires_grad_()]
    output = function(*inputs)
    target = torch.randn(output.shape, generator=torch.Generator().manual_seed(7)).to(output.dtype)
    return [
        output.detach(),
        *torch.autograd.grad((output * target).sum(), [*inputs, *parameters], materialize_grads=True),
    ]


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


def test_bfloat16_equals_the_stock_experts_bit_for_bit() -> None:
    stock = moe_layers(tiny_model(dtype=torch.bfloat16))[0].experts
    index_TK, weights_TK = random_routing(num_tokens=20, num_experts=8, top_k=2)
    hidden_TH = torch.randn(20, HIDDEN, dtype=torch.bfloat16)
    assert torch.equal(
        to_channel_experts(stock)(hidden_TH, index_TK, weights_TK), stock(hidden_TH, index_TK, weights_TK)
    )


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
        assert len(block_nH) == group.last_row - group.first_row
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


def packed_pair(widths: tuple[int, ...]) -> tuple[ChannelExperts, ChannelExperts]:
    """The same experts packed, and dequantised to float32."""
    packed, dense = random_experts(widths), random_experts(widths)
    pack_experts(packed)
    pack_experts(dense)
    unpack_experts(dense, dtype=torch.float32)
    return packed, dense


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


def test_decoding_loads_only_the_experts_that_are_hit(monkeypatch) -> None:
    packed, _ = packed_pair((16,) * 8)
    loaded: list[tuple[int, int]] = []
    storage = packed.projection("up_proj")
    rows = type(storage).rows
    monkeypatch.setattr(
        type(storage),
        "rows",
        lambda self, start, stop, dtype: loaded.append((start, stop)) or rows(self, start, stop, dtype),
    )
    with torch.no_grad():
        packed(torch.randn(1, HIDDEN), torch.tensor([[2, 5]]), torch.rand(1, 2))
    assert set(loaded) == {(32, 48), (80, 96)}


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


@pytest.mark.parametrize("width", [5, 8])
def test_grouped_products_equal_the_loop_with_empty_groups(width) -> None:
    bounds = (0, 4, 4, 9)
    left_Sm, right_Sn, weight_Gmn = torch.randn(9, HIDDEN), torch.randn(9, width), torch.randn(3, HIDDEN, width)
    pieces = [left_Sm[0:4] @ weight_Gmn[0], left_Sm[4:9] @ weight_Gmn[2]]
    torch.testing.assert_close(grouped_matmul(left_Sm, weight_Gmn, bounds), torch.cat(pieces))
    outer = [left_Sm[0:4].T @ right_Sn[0:4], torch.zeros(HIDDEN, width), left_Sm[4:9].T @ right_Sn[4:9]]
    torch.testing.assert_close(grouped_outer(left_Sm, right_Sn, bounds), torch.stack(outer))
    torch.testing.assert_close(grouped_outer(left_Sm[:4], right_Sn[:4], (0, 4)), outer[0].unsqueeze(0))


def test_repr_names_experts_channels_and_widths() -> None:
    assert random_experts((8, 16, 8)).extra_repr() == "num_experts=3, channels=32, distinct widths=[8, 16]"


def test_a_group_of_experts_of_width_one_takes_the_loop():
    torch.manual_seed(0)
    input_Sk, weight_Gkn = torch.randn(6, 1), torch.randn(2, 1, 64)
    expected = torch.cat([input_Sk[:3] @ weight_Gkn[0], input_Sk[3:] @ weight_Gkn[1]])
    assert torch.allclose(grouped_matmul(input_Sk, weight_Gkn, (0, 3, 6)), expected)
