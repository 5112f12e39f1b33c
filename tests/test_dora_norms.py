"""Norms of adapted weights: computed once an optimizer step, and anew whenever a weight changed."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from bitsandbytes.optim.adamw import AdamW8bit
from dora_reference import PerExpertLinears, adapted, channel_experts, routed_input, shake
from peft import LoraConfig
from peft.helpers import rescale_adapter_scale
from torch import nn
from torch.optim import AdamW, Optimizer

from lightning_moe.adapters import DoraExperts
from lightning_moe.models import grouped
from lightning_moe.quantization.nf4 import pack_experts
from scripts.benchmarking import peak_bytes

WIDTHS = [48, 16, 32, 0, 16, 48, 32]
HIT = [0, 1, 2, 4, 5]


class RawPointerSGD(Optimizer):
    """Writes through `.data`, which leaves no trace in a parameter's version, as kernels on raw pointers do."""

    def __init__(self, parameters: Iterator[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 1e-3})

    def step(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.data -= 1e-3 * parameter.grad


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


def _cast_and_back(layer: DoraExperts) -> None:
    layer.half().float()  # the new memory may be where the old one was


def _new_storage_of_base(layer: DoraExperts) -> None:
    weight = layer.experts.projection("gate_proj").weight
    for _ in range(2):
        weight.data = weight.data * 2


def _new_codes(layer: DoraExperts) -> None:
    pack_experts(layer.experts)
    layer(*routed_input(20, layer.experts, hit=HIT))
    codes = layer.experts.projection("down_proj").codes
    codes.data = codes.data.flip(0)


def _scale(layer: DoraExperts) -> None:
    layer.set_scale("default", 3)


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
        _cast_and_back,
        _new_storage_of_base,
        _new_codes,
        _scale,
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
    fresh.base_layer, fresh.scaling = layer.base_layer, layer.scaling
    fresh.load_state_dict(layer.state_dict())
    after = layer(*inputs)
    assert not torch.allclose(after, before, atol=1e-5)
    assert torch.equal(after, fresh.train(layer.training)(*inputs))


def test_peft_rescales_an_adapter_for_a_while() -> None:
    layer = adapted(channel_experts(WIDTHS))
    inputs = routed_input(20, layer.experts, hit=HIT)
    before = layer(*inputs)
    with rescale_adapter_scale(nn.ModuleList([layer]), 0.3):
        merged = layer.merged_experts(dtype=torch.float32)
        torch.testing.assert_close(layer(*inputs), merged(*inputs), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(merged(*inputs), before, atol=1e-3)
    assert torch.equal(layer(*inputs), before)


def test_every_change_of_mode_forgets_the_norms() -> None:
    """Weight averaging swaps through `.data` between such calls, and Lightning puts the mode back without one."""
    layer = adapted(channel_experts(WIDTHS)).eval()
    inputs = routed_input(20, layer.experts, hit=HIT)
    parameter = layer.adapter_parameters("default")["lora_B_up"]

    def forget_by_calls() -> None:
        layer.train()
        parameter.data.mul_(3)
        layer.eval()

    def forget_by_mode() -> None:
        parameter.data.mul_(3)
        layer.training = not layer.training

    for forget in (forget_by_calls, forget_by_mode):
        before = layer(*inputs)
        forget()
        after = layer(*inputs)
        assert not torch.allclose(after, before, atol=1e-4)
        assert torch.equal(after, copy.deepcopy(layer)(*inputs))


def test_norms_of_the_base_are_ordinary_fp32_tensors_whatever_casts_and_modes_do() -> None:
    layer = adapted(channel_experts([16, 32], packed=True))
    hidden_TH, index_TK, weights_TK = routed_input(12, layer.experts, hit=[0, 1])
    first = layer.base_sq()
    layer.to(torch.bfloat16)
    with torch.inference_mode():
        layer(hidden_TH.bfloat16(), index_TK, weights_TK)
    for side, squares in layer.base_sq().items():
        assert not squares.is_inference()
        assert squares.dtype == torch.float32
        assert torch.equal(squares, first[side])
    layer.float()(hidden_TH, index_TK, weights_TK).sum().backward()
    assert all(value.dtype == torch.float64 for value in adapted(channel_experts([16])).double().base_sq().values())


def test_norms_are_computed_in_the_memory_of_one_run() -> None:
    experts = channel_experts([512] * 8, hidden_size=2048, packed=True)  # one expert is a run
    layer = DoraExperts(experts, "default", LoraConfig(use_dora=True), r=2, lora_alpha=4)
    run = 4 * 512 * 2048
    for compute in (lambda: layer.train().base_sq(), lambda: layer.adapted_down_norm("default")):
        # Its rows with their scales, and their squares; all norms.
        assert run < peak_bytes(compute) < 2.2 * run + 4 * 8 * (2 * 512 + 2048)


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
