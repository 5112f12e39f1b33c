"""An expert that never gets a token, and one that gets all: every method, repair, packing and a training step."""

import pytest
import torch
from tiny_models import NUM_EXPERTS, TOP_K, random_tokens, tiny_model

from lightning_moe.adapters.inject import AdapterConfig, inject_adapters
from lightning_moe.allocation import PRESETS, build_method
from lightning_moe.calibration.collector import collect_statistics
from lightning_moe.calibration.gradients import collect_gradients
from lightning_moe.calibration.unseen import unseen_experts
from lightning_moe.models.discovery import moe_layers
from lightning_moe.models.routers import row_tensor, without_adapter
from lightning_moe.quantization.linears import quantize_model
from lightning_moe.surgery.cut import apply_plan
from lightning_moe.surgery.repair import plan_repair
from lightning_moe.training.losses import next_token_loss

pytestmark = pytest.mark.fault

IDS = random_tokens(batch=4, length=24)
LOADERS = {"a": [{"input_ids": IDS}, {"input_ids": random_tokens(batch=4, length=24, seed=1)}]}
ODD = 3
# Methods of whole experts have no blocks of channels.
WHOLE = {"tb_coverage", "random", "frequency", "router_weight", "router_probability", "reap", "man", "msan", "mone"}
WHOLE |= {"aimer", "expert_sparsity", "expert_dropping"}


def routed(*, starved, name="qwen3_moe", **overrides):
    """A model whose expert 3 gets no token at all, or every one."""
    model = tiny_model(name, **overrides)
    with torch.no_grad():
        for layer in moe_layers(model):
            weight_EH = row_tensor(without_adapter(layer.router), "weight")
            weight_EH *= 0.05
            weight_EH[:, 0] = 0.0
            weight_EH[ODD, 0] = -50.0 if starved else 50.0
        model.get_input_embeddings().weight[:, 0] = 3.0  # a feature that all tokens have in common
    return model


def measured(model):
    statistics = collect_statistics(model, loaders=LOADERS, progress=False)
    return statistics.with_sums(collect_gradients(model, loaders=LOADERS, progress=False))


@pytest.fixture(scope="module", params=[True, False], ids=["starved", "all"])
def case(request):
    return request.param, measured(routed(starved=request.param))


def test_the_routing_is_what_it_is_meant_to_be(case):
    starved, statistics = case
    num_tokens = sum(batch["input_ids"].numel() for batch in LOADERS["a"])
    for layer in statistics.corpora["a"]:
        assert float(layer["count"][ODD]) == (0 if starved else num_tokens)
        assert float(layer["count"].sum()) == TOP_K * num_tokens
    assert ((moe_layers(tiny_model())[0].name, ODD) in unseen_experts(statistics)) is starved


@pytest.mark.parametrize("ratio", [0.25, 0.75])
@pytest.mark.parametrize("method", PRESETS)
def test_every_method_cuts_packs_and_trains(case, method, ratio):
    starved, statistics = case
    model = routed(starved=starved)
    plan = build_method(method, **({} if method in WHOLE else {"align": 8})).plan(statistics, prune_ratio=ratio)
    assert plan.num_kept == round((1 - ratio) * plan.shape.num_channels)
    assert all(sum(width > 0 for width in plan.widths(index)) >= TOP_K for index in range(2))
    repair = plan_repair(model, plan=plan, loaders=LOADERS, progress=False)
    assert all(rows_kH.isfinite().all() for rows_kH in repair.down_rows)
    apply_plan(model, plan=plan, repair=repair)
    quantize_model(model)
    inject_adapters(model, config=AdapterConfig(expert_rank=2, router_rank=2))
    model.train()
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    for _ in range(2):
        loss = next_token_loss(model(input_ids=IDS, use_cache=False).logits, IDS)
        optimizer.zero_grad()
        loss.backward()
        assert loss.isfinite()
        assert all(value.grad is not None and value.grad.isfinite().all() for value in trained.values())
        optimizer.step()
    assert all(value.isfinite().all() for value in trained.values())


@pytest.mark.parametrize("method", ["exact_global", "paper_a", "channel_coverage", "reap", "frequency"])
def test_what_no_token_reaches_goes_first_and_what_all_reach_stays(method):
    kept = {}
    for starved in (True, False):
        statistics = measured(routed(starved=starved))
        unused = [expert for _, expert in unseen_experts(statistics)]
        arguments = {} if method in WHOLE else {"align": 8}
        plan = build_method(method, **arguments).plan(statistics, prune_ratio=0.5)
        kept[starved] = [plan.widths(index)[ODD] for index in range(2)]
        assert (ODD in unused) is starved
    assert kept == {True: [0, 0], False: [32, 32]}


def test_the_repair_leaves_rows_without_tokens_alone(case):
    """Uniform widths keep half of every expert, also of one that nothing is known of."""
    starved, statistics = case
    model = routed(starved=starved)
    plan = build_method("uniform", align=8).plan(statistics, prune_ratio=0.5)
    repair = plan_repair(model, plan=plan, loaders=LOADERS, progress=False)
    for layer, statistic in zip(moe_layers(model), statistics.corpora["a"], strict=True):
        keep_En = plan.keep[layer.index].view(NUM_EXPERTS, -1)
        rows = repair.down_rows[layer.index].split(plan.widths(layer.index))
        for expert in (statistic["count"] == 0).nonzero().flatten().tolist():
            old_kH = layer.experts.down_proj[expert].T[keep_En[expert]]
            assert torch.equal(rows[expert], old_kH)
        if not starved:
            changed = ~torch.isclose(rows[ODD], layer.experts.down_proj[ODD].T[keep_En[ODD]])
            assert changed.any()


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v2", "deepseek_v3_grouped"])
@pytest.mark.parametrize("starved", [True, False])
def test_other_routers(name, starved):
    model = routed(starved=starved, name=name)
    statistics = collect_statistics(model, loaders=LOADERS, progress=False)
    plan = build_method("exact_global", align=8).plan(statistics, prune_ratio=0.25)
    repair = plan_repair(model, plan=plan, loaders=LOADERS, progress=False)
    apply_plan(model, plan=plan, repair=repair)
    assert model(input_ids=IDS, use_cache=False).logits.isfinite().all()
