"""The hand-written step of adapted experts: its gradients, what is kept, checkpointing, compile, its odd cases."""

from collections.abc import Callable

import pytest
import torch
from dora_reference import PerExpertLinears, adapted, channel_experts, routed_input, shake
from peft import LoraConfig
from tiny_models import random_tokens, tiny_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lightning_moe.adapters import AdapterConfig, DoraExperts, inject_adapters
from lightning_moe.models import grouped
from lightning_moe.quantization.linears import quantize_model
from lightning_moe.surgery.cut import convert_experts

WIDTHS = [48, 16, 32, 0, 16, 48, 32]
HIT = [0, 1, 2, 4, 5]


@pytest.fixture(params=["grouped runs", "one expert a run"])
def run_length(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small experts share a run; real ones have each their own."""
    if request.param == "one expert a run":
        monkeypatch.setattr(grouped, "_RUN_BYTES_CPU", 1)


@pytest.mark.parametrize("num_tokens", [24, 400])
@pytest.mark.parametrize("use_dora", [True, False])
@pytest.mark.usefixtures("run_length")
def test_few_and_many_tokens_in_runs_of_any_length_equal_stock_peft(use_dora: bool, num_tokens: int) -> None:
    layer = adapted(channel_experts(WIDTHS, packed=True), use_dora=use_dora, rank=16)
    reference = PerExpertLinears(layer)
    inputs = routed_input(num_tokens, layer.experts, hit=HIT)
    output, expected = layer(*inputs), reference(*inputs)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    output.square().sum().backward()
    expected.square().sum().backward()
    for (expert, side), linear in reference.linears().items():
        others = [parameter.grad for parameter in reference.parameters_of(linear)]
        for mine, other in zip(reference.sources(expert, side, gradient=True), others, strict=True):
            other = torch.zeros_like(mine) if other is None else other
            assert (mine - other).norm() <= 1e-5 * other.norm()


@pytest.mark.usefixtures("run_length")
def test_autocast_gradients_stay_within_bf16_rounding() -> None:
    layer = adapted(channel_experts([64, 64, 128], packed=True))
    inputs = routed_input(64, layer.experts, hit=[0, 1, 2])
    exact, rounded = [], []
    for enabled, gradients in ((False, exact), (True, rounded)):
        leaves = [inputs[0].clone().requires_grad_(), inputs[2].clone().requires_grad_()]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            output = layer(leaves[0], inputs[1], leaves[1])
        leaves += list(layer.adapter_parameters("default").values())
        gradients += torch.autograd.grad(output.square().sum(), leaves)
    for value, expected in zip(rounded, exact, strict=True):
        assert value.dtype == torch.float32
        assert (value - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("act_fn", [nn.SiLU(), nn.GELU(approximate="tanh"), nn.ReLU()])
def test_any_activation(act_fn: nn.Module) -> None:
    layer = adapted(channel_experts(WIDTHS))
    layer.experts.act_fn = act_fn
    hidden_TH, index_TK, weights_TK = routed_input(20, layer.experts, hit=HIT)
    hidden_TH.requires_grad_()
    merged = layer.merged_experts(dtype=torch.float32)
    expected = torch.autograd.grad(merged(hidden_TH, index_TK, weights_TK).square().sum(), hidden_TH)[0]
    gradient = torch.autograd.grad(layer(hidden_TH, index_TK, weights_TK).square().sum(), hidden_TH)[0]
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


class Swish(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.ones(()))

    def forward(self, value: Tensor) -> Tensor:
        return value * torch.sigmoid(self.beta * value)


@pytest.mark.parametrize(
    ("act_fn", "message"),
    [
        (Swish(), r"Swish has parameters, which get no gradient .* Use an activation without"),
        (nn.ReLU(inplace=True), r"ReLU overwrites its input.*inplace=False"),
        (nn.SiLU(inplace=True), r"SiLU overwrites its input.*inplace=False"),
    ],
)
def test_activations_that_backward_would_get_wrong_are_refused(act_fn: nn.Module, message: str) -> None:
    experts = channel_experts(WIDTHS)
    experts.act_fn = act_fn
    with pytest.raises(ValueError, match=message):
        DoraExperts(experts, "default", LoraConfig(use_dora=True), r=2, lora_alpha=4)


def test_frozen_parts_get_no_gradient_and_change_no_other() -> None:
    layer = adapted(channel_experts(WIDTHS))
    hidden_TH, index_TK, weights_TK = routed_input(20, layer.experts, hit=HIT)
    leaves = {"hidden": hidden_TH, "weights": weights_TK, **layer.adapter_parameters("default")}

    def gradients(trainable: set[str]) -> dict[str, Tensor | None]:
        for name, leaf in leaves.items():
            leaf.requires_grad_(name in trainable).grad = None
        layer(hidden_TH, index_TK, weights_TK).square().sum().backward()
        return {name: leaf.grad for name, leaf in leaves.items()}

    everything = gradients(set(leaves))
    for trainable in ({"hidden"}, {"weights"}, {"lora_A_down", "lora_magnitude_gate"}, set(leaves) - {"hidden"}):
        for name, gradient in gradients(trainable).items():
            assert (gradient is not None) == (name in trainable)
            assert gradient is None or torch.equal(gradient, everything[name])


def test_backward_may_run_twice_and_is_differentiable_once() -> None:
    layer = adapted(channel_experts(WIDTHS, packed=True))
    hidden_TH, index_TK, weights_TK = routed_input(20, layer.experts, hit=HIT)
    hidden_TH.requires_grad_()
    loss = layer(hidden_TH, index_TK, weights_TK).square().sum()
    first = torch.autograd.grad(loss, hidden_TH, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, hidden_TH, retain_graph=True)[0], first)
    twice = torch.autograd.grad(loss, hidden_TH, create_graph=True)[0]
    with pytest.raises(RuntimeError, match=r"once_differentiable"):
        twice.sum().backward()


@pytest.mark.parametrize("use_dora", [True, False])
def test_few_numbers_are_kept_for_backward(use_dora: bool) -> None:
    """Beyond inputs and parameters, of each pair 2 n + 3 r, and for DoRA H; its scales are E (2 n + H)."""
    experts, num_pairs, rank = channel_experts([32, 32], hidden_size=128, packed=True), 200, 4
    layer = adapted(experts, rank=rank, use_dora=use_dora)
    inputs = routed_input(num_pairs // 2, experts, top_k=2, hit=[0, 1])
    given = {value.untyped_storage().data_ptr() for value in (*inputs, *layer.parameters())}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = 0 if storage.data_ptr() in given else storage.nbytes()
        return tensor

    with saved_tensors_hooks(count, lambda tensor: tensor):
        output = layer(*inputs)
    numbers = num_pairs * (2 * 32 + 3 * rank) + (num_pairs * 128 + 2 * (2 * 32 + 128) if use_dora else 0)
    assert sum(kept.values()) == 4 * numbers
    assert output.requires_grad


def _gradients(change: Callable[[nn.Module], nn.Module]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = tiny_model("qwen3_moe")
    convert_experts(model)
    quantize_model(model)
    peft_model = inject_adapters(model, config=AdapterConfig(expert_rank=2, router_rank=2)).train()
    shake(peft_model, scale=0.05)
    loss = change(peft_model)(input_ids=random_tokens(), labels=random_tokens(), use_cache=False).loss
    loss.backward()
    gradients = {name: p.grad for name, p in peft_model.named_parameters() if p.requires_grad}
    return {"loss": loss.detach(), **gradients}


def _assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_changes_no_gradient_and_computes_no_norm_twice(
    use_reentrant: bool, norms_computed: list[int]
) -> None:
    def checkpointed(peft_model: nn.Module) -> nn.Module:
        model = peft_model.get_base_model()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        return peft_model

    expected = _gradients(lambda peft_model: peft_model)
    num_plain = len(norms_computed)
    found = _gradients(checkpointed)
    _assert_same(found, expected)
    assert len(norms_computed) == 2 * num_plain > 0


# torch.compile itself asks tensors that cross a break for their `.grad`.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_model_breaks_its_graph_at_the_experts_and_gives_the_same_gradients() -> None:
    expected = _gradients(lambda peft_model: peft_model)
    _assert_same(_gradients(lambda peft_model: torch.compile(peft_model, backend="aot_eager")), expected)
    torch._dynamo.reset()
