"""The hand-written step of adapted experts: cached norms, what is kept, checkpointing, compile, and its odd cases."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from bitsandbytes.optim.adamw import AdamW8bit
from dora_reference import PerExpertLinears, adapted, channel_experts, routed_input, shake
from peft import LoraConfig
from tiny_models import random_tokens, tiny_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import AdamW, Optimizer

from lightning_moe.adapters import AdapterConfig, DoraExperts, inject_adapters
from lightning_moe.adapters import step as adapted_step
from lightning_moe.models import grouped
from lightning_moe.quantization.linears import quantize_model
from lightning_moe.surgery.cut import convert_experts

WIDTHS = [48, 16, 32, 0, 16, 48, 32]
HIT = [0, 1, 2, 4, 5]


class RawPointerSGD(Optimizer):
    """Writes through `.data`, which leaves no trace in a parameter's version, as kernels on raw pointers do."""

    def __init__(self, parameters: Iterator[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 1e-3})

    def step(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.data -= 1e-3 * parameter.grad


@pytest.fixture
def norms_computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets the number of experts of each computation of norms (three a run)."""
    calls: list[int] = []
    original = adapted_step.adapted_norm

    def counted(product_Gro: Tensor, *args: object) -> Tensor:
        calls.append(len(product_Gro))
        return original(product_Gro, *args)

    monkeypatch.setattr(adapted_step, "adapted_norm", counted)
    return calls


@pytest.fixture(params=["grouped runs", "one expert a run"])
def run_length(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small experts share a run; real ones have each their own."""
    if request.param == "one expert a run":
        monkeypatch.setattr(grouped, "_RUN_BYTES_CPU", 1)


@pytest.mark.parametrize(
    "build",
    [
        lambda p: AdamW(p, lr=0.05),
        lambda p: AdamW(p, lr=0.05, fused=True),
        RawPointerSGD,
        lambda p: AdamW8bit(p, lr=0.05),
    ],
    ids=["AdamW", "fused", "raw pointers", "8 bit"],
)
def test_norms_are_computed_once_per_optimizer_step(
    build: Callable[[Iterator[nn.Parameter]], Optimizer], norms_computed: list[int]
) -> None:
    layer = adapted(channel_experts([16, 32], packed=True))
    optimizer = build(parameter for parameter in layer.parameters() if parameter.requires_grad)
    inputs = routed_input(12, layer.experts, hit=[0, 1])
    for _ in range(3):
        before = layer(*inputs)
        norms_computed.clear()
        for _ in range(4):
            layer(*inputs).square().sum().backward()
        assert norms_computed == []  # `before` was the first micro-batch
        optimizer.step()
        after = layer(*inputs)
        assert norms_computed == [1] * 6  # two widths, three projections
        assert not torch.allclose(after, before, atol=1e-4)
        assert torch.equal(after, copy.deepcopy(layer)(*inputs))


def _edit_in_place(layer: DoraExperts) -> None:
    with torch.no_grad():
        layer.adapter_parameters("default")["lora_A_gate"].add_(0.3)


def _swap_data_for_evaluation(layer: DoraExperts) -> None:
    layer.adapter_parameters("default")["lora_B_up"].data.mul_(3)
    layer.eval()


def _new_storage(layer: DoraExperts) -> None:
    parameter = layer.adapter_parameters("default")["lora_B_down"]
    parameter.data = parameter.data * 3


def _load(layer: DoraExperts) -> None:
    layer.load_state_dict(adapted(channel_experts(WIDTHS, seed=5), seed=9).state_dict())


def _assign(layer: DoraExperts) -> None:
    layer.load_state_dict(adapted(channel_experts(WIDTHS, seed=5), seed=9).state_dict(), assign=True)


def _replace_base(layer: DoraExperts) -> None:
    layer.base_layer = channel_experts(WIDTHS, seed=6)


def _change_base(layer: DoraExperts) -> None:
    with torch.no_grad():
        layer.experts.projection("up_proj").weight.mul_(2)


def _cast_base(layer: DoraExperts) -> None:
    layer.experts.to(torch.bfloat16)


def _other_adapter(layer: DoraExperts) -> None:
    layer.update_layer("other", 4, 8, LoraConfig(use_dora=True))
    layer.set_adapter("other")
    shake(layer, seed=8)


@pytest.mark.parametrize(
    "change",
    [
        _edit_in_place,
        _swap_data_for_evaluation,
        _new_storage,
        _load,
        _assign,
        _replace_base,
        _change_base,
        _cast_base,
        _other_adapter,
    ],
)
def test_cached_norms_follow_every_change(change: Callable[[DoraExperts], None]) -> None:
    layer = adapted(channel_experts(WIDTHS))
    inputs = routed_input(20, layer.experts, hit=HIT)
    before = layer(*inputs)
    change(layer)
    fresh = adapted(channel_experts(WIDTHS))
    if change is _other_adapter:
        _other_adapter(fresh)
    fresh.base_layer = layer.base_layer
    fresh.load_state_dict(layer.state_dict())
    after = layer(*inputs)
    assert not torch.allclose(after, before, atol=1e-4)
    assert torch.equal(after, fresh.train(layer.training)(*inputs))


def test_switching_adapters_keeps_the_norms_of_each(norms_computed: list[int]) -> None:
    layer = adapted(channel_experts([16]))
    inputs = routed_input(6, layer.experts, top_k=1, hit=[0])
    layer.update_layer("other", 2, 4, LoraConfig(use_dora=True))
    for name in ("default", "other", "default", "other"):
        layer.set_adapter(name)
        layer(*inputs)
    assert norms_computed == [1] * 6


@pytest.mark.parametrize(("hidden_size", "rank"), [(64, 4), (2048, 16)])
def test_outputs_do_not_depend_on_whether_norms_are_known(hidden_size: int, rank: int) -> None:
    """With 2,048 numbers a row the norms come out of the same oneDNN product as the outputs."""
    experts = channel_experts([64, 128], hidden_size=hidden_size, packed=True)
    layer = adapted(experts, rank=rank)
    inputs = routed_input(24, experts, top_k=2, hit=[0, 1])
    torch.testing.assert_close(layer(*inputs), layer(*inputs), rtol=1e-6, atol=1e-6)
    layer.eval()
    reference = PerExpertLinears(layer)
    torch.testing.assert_close(layer(*inputs), reference(*inputs), rtol=1e-4, atol=1e-4)


def test_a_copy_shares_no_norms() -> None:
    layer = adapted(channel_experts(WIDTHS))
    inputs = routed_input(20, layer.experts, hit=HIT)
    output = layer(*inputs)
    copied = copy.deepcopy(layer)
    _swap_data_for_evaluation(copied)
    assert not torch.allclose(copied(*inputs), output, atol=1e-4)
    assert torch.equal(layer(*inputs), output)


def test_generation_computes_the_norms_of_an_expert_when_it_is_first_hit(
    norms_computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouped, "_RUN_BYTES_CPU", 1)
    layer = adapted(channel_experts([16, 16, 16, 16, 32], packed=True)).eval()
    with torch.inference_mode():
        for hit, computed in (([0, 2], 2), ([2, 0], 0), ([0, 4], 1), ([1, 2], 1)):
            norms_computed.clear()
            index_TK = torch.tensor([hit])
            layer(torch.randn(1, 64), index_TK, torch.tensor([[0.5, 0.5]]))
            assert sum(norms_computed) == 3 * computed
    layer(torch.randn(1, 64), index_TK, torch.tensor([[0.5, 0.5]])).sum().backward()


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
