"""How ChannelExperts splits its work: runs of experts, memory, compiled models, gradient checkpointing."""

# T tokens, K experts per token, S routed pairs, G experts of equal width, n channels, H hidden

import pytest
import torch
from random_experts import HIDDEN, RAGGED, UNALIGNED, gradients, naive, packed_pair, random_experts, random_routing
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_moe.models.channel_experts import ChannelExperts
from lightning_moe.models.grouped import Routing, WidthGroup, expert_runs, grouped_matmul, grouped_outer
from lightning_moe.quantization.nf4 import pack_experts
from scripts.benchmarking import peak_bytes


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


@pytest.mark.parametrize("width", [5, 8])
def test_grouped_products_equal_the_loop_with_empty_groups(width) -> None:
    bounds = (0, 4, 4, 9)
    left_Sm, right_Sn, weight_Gmn = torch.randn(9, HIDDEN), torch.randn(9, width), torch.randn(3, HIDDEN, width)
    pieces = [left_Sm[0:4] @ weight_Gmn[0], left_Sm[4:9] @ weight_Gmn[2]]
    torch.testing.assert_close(grouped_matmul(left_Sm, weight_Gmn, bounds), torch.cat(pieces))
    outer = [left_Sm[0:4].T @ right_Sn[0:4], torch.zeros(HIDDEN, width), left_Sm[4:9].T @ right_Sn[4:9]]
    torch.testing.assert_close(grouped_outer(left_Sm, right_Sn, bounds), torch.stack(outer))
    torch.testing.assert_close(grouped_outer(left_Sm[:4], right_Sn[:4], (0, 4)), outer[0].unsqueeze(0))


def test_a_group_of_experts_of_width_one_takes_the_loop():
    torch.manual_seed(0)
    input_Sk, weight_Gkn = torch.randn(6, 1), torch.randn(2, 1, 64)
    expected = torch.cat([input_Sk[:3] @ weight_Gkn[0], input_Sk[3:] @ weight_Gkn[1]])
    assert torch.allclose(grouped_matmul(input_Sk, weight_Gkn, (0, 3, 6)), expected)


@pytest.mark.parametrize("widths", [RAGGED, UNALIGNED, (16,) * 8], ids=["ragged", "unaligned", "equal"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 5e-2)], ids=str
)
@pytest.mark.parametrize(("num_tokens", "top_k"), [(1, 1), (1, 8), (40, 3)])
def test_without_gradients_the_output_is_that_of_the_naive_loop(num_tokens, top_k, widths, dtype, tolerance) -> None:
    experts = random_experts(widths, dtype=dtype)
    index_TK, weights_TK = random_routing(num_tokens=num_tokens, num_experts=8, top_k=top_k)
    hidden_TH = torch.randn(num_tokens, HIDDEN).to(dtype)
    with torch.no_grad():
        ours, expected = experts(hidden_TH, index_TK, weights_TK), naive(experts, hidden_TH, index_TK, weights_TK)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance * max(float(expected.abs().max()), 1.0))
    with torch.inference_mode():
        assert torch.equal(experts(hidden_TH, index_TK, weights_TK), ours)


def test_large_experts_equal_the_naive_loop() -> None:
    """Sizes at which every fast product is taken: sums of rows, oneDNN, groups of small experts."""
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
        experts = random_experts((32, 256, 32, 512, 32, 256), dtype=dtype, hidden=1024)
        for num_tokens in (1, 3, 40):
            index_TK, weights_TK = random_routing(num_tokens=num_tokens, num_experts=6, top_k=3)
            hidden_TH = 0.1 * torch.randn(num_tokens, 1024).to(dtype)
            with torch.no_grad():
                ours = experts(hidden_TH, index_TK, weights_TK)
                expected = naive(experts, hidden_TH, index_TK, weights_TK)
            torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_a_forward_without_gradients_copies_no_weights(packed, dtype) -> None:
    width = hidden = 1024  # one expert is a run
    experts = random_experts((width, width, 512, width), dtype=dtype, hidden=hidden)
    if packed:
        pack_experts(experts)
    index_TK, weights_TK = random_routing(num_tokens=16, num_experts=4, top_k=2)
    arguments = torch.randn(16, hidden).to(dtype), index_TK, weights_TK.to(dtype)
    with torch.no_grad():
        experts(*arguments)
        peak = peak_bytes(lambda: experts(*arguments))
    pairs = 16  # of one expert, rounded up as `product` does
    assert int(index_TK.flatten().bincount().max()) <= pairs
    # Sums and their rounding; input (twice), output, weighted output and its rounding of one expert's pairs, and its
    # three activations; some scratch of the kernels, per thread.
    activations = 4 * (2 * 16 * hidden + pairs * (5 * hidden + 3 * width)) + 2**17
    projection = dtype.itemsize * width * hidden
    assert activations < projection / 2
    scales = 12 * width * hidden // 64
    assert peak < activations + (projection + scales if packed else 0)
    assert not packed or peak > projection  # the profile does see dequantised rows


@pytest.mark.parametrize("packed", [False, True])
def test_autocast_without_gradients_computes_in_its_type(packed) -> None:
    experts = packed_pair(UNALIGNED)[0 if packed else 1]
    index_TK, weights_TK = random_routing(num_tokens=30, num_experts=8, top_k=3)
    hidden_TH = torch.randn(30, HIDDEN)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output = experts(hidden_TH, index_TK, weights_TK)
    with torch.no_grad():
        expected = experts(hidden_TH, index_TK, weights_TK)
    assert output.dtype == torch.float32
    assert 0 < (output - expected).abs().max() < 0.05 * expected.abs().max()


def test_experts_are_split_into_runs_by_their_size() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    # 4 x 512 x 1024 bytes are 2 MiB of the 4 MiB that a CPU's run may have, and the whole group fits a GPU's.
    group = WidthGroup(first_slot=3, num_experts=5, width=512, first_row=7)
    bounds = (10, 12, 13, 17, 17, 20)
    runs = expert_runs(group, bounds, hidden_size=1024, packed=True, device=cpu)
    assert [(run.first, run.start, run.stop, run.bounds) for run in runs] == [
        (0, 10, 13, (0, 2, 3)),
        (2, 13, 17, (0, 4)),
        (4, 17, 20, (0, 3)),
    ]
    assert [run.num_experts for run in runs] == [2, 1, 1]
    (whole,) = expert_runs(group, bounds, hidden_size=1024, packed=True, device=cuda)
    assert (whole.first, whole.num_experts, whole.width, whole.bounds) == (0, 5, 512, (0, 2, 3, 7, 7, 10))
    huge = expert_runs(group, bounds, hidden_size=2**20, packed=False, device=cpu)
    assert [run.num_experts for run in huge] == [1, 1, 1, 1]  # never less than one expert


def test_packed_rows_of_experts_without_tokens_are_left_out_where_few_are_hit() -> None:
    group = WidthGroup(first_slot=0, num_experts=6, width=8, first_row=0)
    few, most = (0, 0, 2, 3, 3, 3, 4), (0, 1, 2, 3, 3, 4, 5)
    for device, packed, bounds, expected in (
        ("cuda", True, few, [(1, 2), (5, 1)]),
        ("cuda", True, most, [(0, 6)]),
        ("cuda", False, few, [(0, 6)]),
        ("cpu", False, few, [(1, 2), (5, 1)]),
        ("cpu", True, most, [(0, 3), (4, 2)]),
    ):
        runs = expert_runs(group, bounds, hidden_size=64, packed=packed, device=torch.device(device))
        assert [(run.first, run.num_experts) for run in runs] == expected
        assert sum(run.bounds[-1] for run in runs) == bounds[-1]
    assert expert_runs(group, (3,) * 7, hidden_size=64, packed=False, device=torch.device("cuda")) == []


class Block(nn.Module):
    """A model around experts, with arithmetic before and after."""

    def __init__(self, experts: ChannelExperts) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        return hidden_TH + self.experts(2 * hidden_TH.sin(), index_TK, weights_TK).cos()


# What the compiler itself does with an intermediate tensor at a break of the graph.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("packed", [False, True])
def test_a_compiled_model_gives_the_same_outputs_and_gradients(packed) -> None:
    torch.compiler.reset()
    block = Block(packed_pair(RAGGED)[0 if packed else 1])
    compiled = torch.compile(block, backend="aot_eager")
    parameters = list(block.parameters()) if not packed else []
    for num_tokens in (20, 7):
        index_TK, weights_TK = random_routing(num_tokens=num_tokens, num_experts=8, top_k=2)
        hidden_TH = torch.randn(num_tokens, HIDDEN)
        mine = gradients(lambda x, w, i=index_TK: compiled(x, i, w), hidden_TH, weights_TK, parameters)
        expected = gradients(lambda x, w, i=index_TK: block(x, i, w), hidden_TH, weights_TK, parameters)
        for value, reference in zip(mine, expected, strict=True):
            torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-6)


def test_one_graph_for_the_whole_model_is_refused_with_the_reason() -> None:
    torch.compiler.reset()
    compiled = torch.compile(Block(random_experts(RAGGED)), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="the number of tokens of each expert is data"):
        compiled(torch.randn(4, HIDDEN), *random_routing(num_tokens=4, num_experts=8, top_k=2))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_gradient_checkpointing_changes_nothing(packed, reentrant) -> None:
    experts = packed_pair(RAGGED)[0 if packed else 1]
    parameters = [] if packed or reentrant else list(experts.parameters())
    index_TK, weights_TK = random_routing(num_tokens=30, num_experts=8, top_k=3)
    hidden_TH = torch.randn(30, HIDDEN)
    plain = gradients(lambda x, w: experts(x, index_TK, w), hidden_TH, weights_TK, parameters)
    if reentrant:
        inputs = [hidden_TH.clone().requires_grad_(), weights_TK.clone().requires_grad_()]
        output = checkpoint(experts, inputs[0], index_TK, inputs[1], use_reentrant=True)
        target = torch.randn(output.shape, generator=torch.Generator().manual_seed(7))
        (output * target).sum().backward()
        found = [output.detach(), inputs[0].grad, inputs[1].grad]
    else:
        found = gradients(
            lambda x, w: checkpoint(experts, x, index_TK, w, use_reentrant=False), hidden_TH, weights_TK, parameters
        )
    for value, reference in zip(found, plain, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-6)


def test_routing_bounds_count_the_pairs_of_each_slot() -> None:
    routing = Routing.sort(torch.tensor([[3, 1], [1, 5], [3, 1]]), num_slots=7)
    assert routing.bounds == (0, 0, 3, 3, 5, 5, 6, 6)
    assert routing.order_S.tolist() == [1, 2, 5, 0, 4, 3]
    assert routing.token_S.tolist() == [0, 1, 2, 0, 2, 1]
