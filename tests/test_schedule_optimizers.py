"""Optimizers of many kinds follow cuts of experts, routers and adapters; those that cannot are refused by name."""

import copy

import pytest
import torch
from accelerate import Accelerator
from adapted_cases import adapted_model
from bitsandbytes.optim import AdamW8bit, AdamW32bit, PagedAdamW8bit, PagedAdamW32bit
from family_cases import EVICTED, Case
from random_plans import random_plan
from tiny_models import random_tokens, tiny_model
from transformers.optimization import Adafactor as HuggingFaceAdafactor

from lightning_moe.models.discovery import moe_layers
from lightning_moe.surgery.cut import apply_plan, convert_experts
from lightning_moe.surgery.optimizer_state import check_optimizers

pytestmark = pytest.mark.schedule
QWEN3 = Case(name="qwen3_moe")
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "amsgrad": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, amsgrad=True),
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, fused=True),
    "nadam": lambda parameters: torch.optim.NAdam(parameters, lr=1e-3),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=1e-3, momentum=0.5, centered=True),
}


def step(model, optimizer, *, seed=0):
    ids = random_tokens(batch=3, length=20, seed=seed)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def trainable(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def rows_by_hand(plan, layer_index):
    """(old rows of the kept channels, old slots of the kept experts), in the order of the new storage.

    Experts are stored by (width, number); evicted ones are gone.
    """
    before, after = plan.shape.layers[layer_index].widths, plan.widths(layer_index)
    old_order = sorted(range(len(before)), key=lambda expert: (before[expert], expert))
    first_row = {expert: sum(before[e] for e in old_order[:slot]) for slot, expert in enumerate(old_order)}
    kept = [expert for expert in range(len(after)) if after[expert]]
    new_order = sorted(kept, key=lambda expert: (after[expert], expert))
    keep = plan.keep[layer_index].split(before)
    rows = torch.cat([first_row[expert] + keep[expert].nonzero().flatten() for expert in new_order])
    return rows, torch.tensor([old_order.index(expert) for expert in new_order]), torch.tensor(kept)


def moved(state, optimizer, *, name, index):
    """Every state of the parameter's shape is the old one's rows; numbers are kept."""
    for key, value in state.items():
        own = optimizer[key]
        if isinstance(value, torch.Tensor) and value.numel() > 1:
            assert torch.equal(own, value[index]), (name, key)
            assert own.abs().max() > 0, (name, key)
        else:
            assert own == value, (name, key)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_of_weights_and_router_is_the_kept_rows(name):
    model = tiny_model().train()
    convert_experts(model)
    optimizer = OPTIMIZERS[name](model.parameters())
    step(model, optimizer)
    before = {key: copy.deepcopy(optimizer.state[parameter]) for key, parameter in trainable(model).items()}
    plan = random_plan(model, evicted=EVICTED)
    apply_plan(model, plan=plan, optimizers=[optimizer])
    after = trainable(model)
    assert set(map(id, optimizer.state)) <= set(map(id, after.values()))
    for layer in moe_layers(model):
        rows, _, kept = rows_by_hand(plan, layer.index)
        for projection in ("gate_proj", "up_proj", "down_proj"):
            key = f"{layer.name}.{projection}.weight"
            moved(before[key], optimizer.state[after[key]], name=key, index=rows)
        key = f"{layer.router_name}.weight"
        moved(before[key], optimizer.state[after[key]], name=key, index=kept)
    embedding = "model.embed_tokens.weight"
    moved(before[embedding], optimizer.state[after[embedding]], name=embedding, index=slice(None))
    weight = moe_layers(model)[0].experts.up_proj.weight
    old = weight.detach().clone()
    step(model, optimizer, seed=1)
    assert not torch.equal(weight, old)


@pytest.mark.parametrize("packed", [False, True])
def test_state_of_adapters_is_the_kept_rows(packed):
    """Per channel: B and magnitudes of gate and up, A of down. Per expert: the rest, and the router's B and magnitudes.

    Down magnitudes are rescaled by the cut; their moments are selected like all others.
    """
    model = adapted_model(QWEN3, packed=packed).train()
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-3)
    step(model, optimizer)
    before = {key: copy.deepcopy(optimizer.state[parameter]) for key, parameter in trainable(model).items()}
    plan = random_plan(model, evicted=EVICTED)
    apply_plan(model, plan=plan, optimizers=[optimizer])
    after = trainable(model)
    assert after.keys() == before.keys()
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == set(map(id, after.values())) == set(map(id, optimizer.state))
    for layer in moe_layers(model):
        rows, slots, kept = rows_by_hand(plan, layer.index)
        index_of = {"lora_A_gate": slots, "lora_A_up": slots, "lora_B_down": slots, "lora_magnitude_down": slots}
        index_of |= {"lora_A_down": rows, "lora_B_gate": rows, "lora_B_up": rows}
        index_of |= {"lora_magnitude_gate": rows, "lora_magnitude_up": rows}
        index_of |= {"lora_B_router": kept, "lora_magnitude_router": kept, "lora_A_router": slice(None)}
        for name, index in index_of.items():
            (key,) = [key for key in after if key.startswith(layer.block_name) and f".{name}." in key]
            moved(before[key], optimizer.state[after[key]], name=key, index=index)
    step(model, optimizer, seed=1)
    assert {int(state["step"]) for state in optimizer.state.values()} == {2}


def test_a_wrapper_of_accelerate_follows_too():
    model = tiny_model().train()
    convert_experts(model)
    inner = torch.optim.AdamW(model.parameters(), lr=1e-3)
    wrapped = Accelerator(cpu=True).prepare(inner)
    assert type(wrapped).__name__ == "AcceleratedOptimizer"
    step(model, inner)
    check_optimizers([wrapped])
    apply_plan(model, plan=random_plan(model, evicted=EVICTED), optimizers=[wrapped])
    assert {id(p) for group in inner.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}
    assert {id(p) for p in inner.state} == {id(p) for p in model.parameters()}


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (torch.optim.Adafactor, "^Adafactor cannot follow a cut during training: it keeps sums over rows and columns"),
        (HuggingFaceAdafactor, "^Adafactor cannot follow a cut during training: it keeps sums over rows and columns"),
        (torch.optim.LBFGS, "^LBFGS cannot follow .* a history of all weights in one vector. Use an optimizer that"),
        (lambda parameters: torch.optim.SparseAdam(list(parameters)), "^SparseAdam cannot follow .* sparse gradients"),
        (AdamW8bit, "^AdamW8bit cannot follow .* its state in 8 bit, in blocks across rows"),
        (PagedAdamW8bit, "^PagedAdamW8bit cannot follow .* its state in paged memory"),
        (PagedAdamW32bit, "^PagedAdamW32bit cannot follow .* its state in paged memory"),
    ],
)
def test_optimizers_that_cannot_follow_are_refused_by_name(make, match):
    optimizer = make(torch.nn.Linear(4, 4).parameters())
    for one in (optimizer, Accelerator(cpu=True).prepare(optimizer)):
        with pytest.raises(ValueError, match=match):
            check_optimizers([one])


def test_a_32_bit_optimizer_of_bitsandbytes_may_follow():
    check_optimizers([AdamW32bit(torch.nn.Linear(4, 4).parameters())])


@pytest.mark.parametrize(("state", "what"), [(torch.zeros(5), r"\(5,\)"), ([torch.zeros(64)], "list")])
def test_an_unknown_state_is_refused_before_anything_is_cut(state, what):
    model = tiny_model().train()
    convert_experts(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[moe_layers(model)[1].experts.up_proj.weight]["memory"] = state
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    match = rf"SGD's state 'memory' has shape {what} for a parameter of \(256, 64\): it cannot follow"
    with pytest.raises(ValueError, match=match):
        apply_plan(model, plan=random_plan(model), optimizers=[optimizer])
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
