"""An optimizer follows a cut: same object, same groups, moments of what stays."""

import pytest
import torch
from tiny_models import tiny_model

from lightning_moe.models.discovery import model_shape, moe_layers
from lightning_moe.records import PrunePlan
from lightning_moe.surgery.cut import apply_plan, convert_experts


def halving_plan(model, *, evict=()):
    """Keeps the even channels of every expert; evicts the experts of `evict` as a whole."""
    shape = model_shape(model)
    keep = []
    for layer in shape.layers:
        parts = [torch.arange(width) % 2 == 0 for width in layer.widths]
        for expert in evict:
            parts[expert] = torch.zeros_like(parts[expert])
        keep.append(torch.cat(parts))
    return PrunePlan(shape=shape, method="test", prune_ratio=0.5, align=1, keep=tuple(keep), provenance={})


def trained_model():
    model = tiny_model("qwen3_moe", seed=0).train()
    convert_experts(model)
    experts = [p for layer in moe_layers(model) for p in layer.experts.parameters()]
    rest = [p for p in model.parameters() if all(p is not e for e in experts)]
    optimizer = torch.optim.AdamW([{"params": experts, "lr": 1e-2}, {"params": rest, "lr": 1e-3}])
    step(model, optimizer)
    return model, optimizer


def step(model, optimizer):
    ids = torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(1))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def test_moments_of_kept_rows_are_kept_and_the_parameter_goes_on_training():
    model, optimizer = trained_model()
    experts = moe_layers(model)[0].experts
    moments = optimizer.state[experts.gate_proj.weight]["exp_avg"].clone()
    # Equal widths: storage order is the router's order, so the kept rows are the even ones.
    kept = moments[torch.arange(len(moments)) % 2 == 0]
    apply_plan(model, plan=halving_plan(model), optimizers=[optimizer])
    weight = moe_layers(model)[0].experts.gate_proj.weight
    assert torch.equal(optimizer.state[weight]["exp_avg"], kept)
    assert optimizer.state[weight]["step"] == 1
    assert any(weight is parameter for parameter in optimizer.param_groups[0]["params"])
    before = weight.detach().clone()
    step(model, optimizer)
    assert optimizer.state[weight]["step"] == 2
    assert not torch.equal(weight, before)


def test_groups_keep_their_order_their_rates_and_hold_no_old_parameter():
    model, optimizer = trained_model()
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    apply_plan(model, plan=halving_plan(model, evict=(3,)), optimizers=[optimizer])
    assert [len(group["params"]) for group in optimizer.param_groups] == sizes
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 1e-3]
    in_model = {id(parameter) for parameter in model.parameters()}
    assert all(id(parameter) in in_model for group in optimizer.param_groups for parameter in group["params"])
    assert all(id(parameter) in in_model for parameter in optimizer.state)


def test_router_rows_follow_an_evicted_expert():
    model, optimizer = trained_model()
    moments = optimizer.state[moe_layers(model)[0].router.weight]["exp_avg_sq"].clone()
    apply_plan(model, plan=halving_plan(model, evict=(3,)), optimizers=[optimizer])
    router = moe_layers(model)[0].router
    kept = [expert for expert in range(len(moments)) if expert != 3]
    assert router.weight.shape[0] == len(kept)
    assert torch.equal(optimizer.state[router.weight]["exp_avg_sq"], moments[kept])


@pytest.mark.parametrize("fresh", [True, False])
def test_a_cut_before_the_first_step_leaves_no_state_behind(fresh):
    model = tiny_model("qwen3_moe", seed=0)
    convert_experts(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if fresh else torch.optim.AdamW(model.parameters())
    apply_plan(model, plan=halving_plan(model), optimizers=[optimizer])
    assert not optimizer.state
    step(model.train(), optimizer)
