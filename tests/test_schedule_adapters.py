"""Cuts under DoRA and LoRA, in 16 and in 4 bit: the function of a mask, rows of adapters, and what stays as it was."""

import copy

import pytest
import torch
from adapted_cases import SMALL, adapted_model, merged_stock
from family_cases import CASES, EVICTED, Case
from peft import LoraConfig
from random_plans import random_plan
from reference_moe import ROUTER_RULES, mask_stock_model
from tiny_models import random_tokens

from lightning_moe.adapters import AdapterConfig
from lightning_moe.calibration.collector import collect_statistics
from lightning_moe.models.channel_experts import PROJECTIONS
from lightning_moe.models.discovery import is_grouped, moe_layers
from lightning_moe.surgery.cut import apply_plan, cut_layer

pytestmark = pytest.mark.schedule
QWEN3 = Case(name="qwen3_moe")
PLAIN_LORA = AdapterConfig(expert_rank=3, router_rank=2, use_dora=False, shared_expert_rank=0)


def logits(model):
    with torch.no_grad():
        return model(input_ids=random_tokens(batch=3, length=20)).logits


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_cut_under_adapters_is_the_mask(case, packed):
    model = adapted_model(case, packed=packed)
    plan = random_plan(model, evicted=EVICTED)
    masked = mask_stock_model(merged_stock(case, model), rule=ROUTER_RULES[case.name], plan=plan)
    apply_plan(model, plan=plan)
    assert moe_layers(model)[0].base_experts.packed == packed
    torch.testing.assert_close(logits(model), logits(masked), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("packed", [False, True])
def test_two_cuts_under_plain_lora_are_the_mask_of_both(packed):
    model = adapted_model(QWEN3, packed=packed, config=PLAIN_LORA)
    stock = merged_stock(QWEN3, model)
    first = random_plan(model, evicted=EVICTED)
    apply_plan(model, plan=first)
    second = random_plan(model, evicted=((0,), ()), seed=1)
    apply_plan(model, plan=second)
    both = copy.copy(first)
    for kept_C, again_C in zip(both.keep, second.keep, strict=True):
        kept_C[kept_C.clone()] = again_C
    masked = mask_stock_model(stock, rule=ROUTER_RULES["qwen3_moe"], plan=both)
    torch.testing.assert_close(logits(model), logits(masked), rtol=1e-6, atol=1e-6)


def test_rows_of_a_packed_base_are_cut_bit_for_bit():
    model = adapted_model(QWEN3, packed=True)
    layer = moe_layers(model)[0]
    before = copy.deepcopy(layer.base_experts)
    plan = random_plan(model, evicted=EVICTED)
    apply_plan(model, plan=plan)
    keep = plan.keep[0].split(before.widths)
    kept = [expert for expert, keep_n in enumerate(keep) if keep_n.any()]
    for new, old in enumerate(kept):
        for name in PROJECTIONS:
            rows = slice(*layer.base_experts.row_range(new)), slice(*before.row_range(old))
            after, stored = (e.projection(name) for e in (layer.base_experts, before))
            for part in ("codes", "absmax", "scale"):
                assert torch.equal(getattr(after, part)[rows[0]], getattr(stored, part)[rows[1]][keep[old]])


@pytest.mark.parametrize("case", [case for case in CASES if case.name in ("qwen3_moe", "deepseek_v3_grouped")])
def test_every_replaced_parameter_is_reported_as_the_rows_that_were_selected(case):
    """All but the rescaled down magnitudes are the old numbers; those are `m ||W_kept|| / ||W||`."""
    model = adapted_model(case, packed=False)
    layer = moe_layers(model)[0]
    before = dict(layer.block.named_parameters())
    old_norm_EH = layer.experts.adapted_down_norm("default")
    replaced = cut_layer(layer, keep_C=random_plan(model, evicted=EVICTED).keep[0])
    by_old, after = {id(one.old): one for one in replaced}, dict(layer.block.named_parameters())
    changed = {name for name, parameter in before.items() if after[name] is not parameter}
    assert changed == {name for name, parameter in before.items() if id(parameter) in by_old}
    assert sum("router" in name for name in changed) == (0 if is_grouped(layer) else 2)
    for name in changed:
        one = by_old[id(before[name])]
        assert one.new is after[name]
        assert one.new.requires_grad == one.old.requires_grad == ("lora_" in name)
        selected = one.old.index_select(one.dim, one.index)
        if "magnitude_down" in name:
            ratio_EH = layer.experts.adapted_down_norm("default") / old_norm_EH[one.index].clamp_min(1e-30)
            selected = selected * ratio_EH
        torch.testing.assert_close(one.new, selected)


def test_the_module_its_mode_its_adapters_and_their_bookkeeping_survive():
    model = adapted_model(QWEN3, packed=True).train()
    layer = moe_layers(model)[0]
    experts, router = layer.experts, layer.router
    experts.update_layer("second", 5, 10, LoraConfig(use_dora=True))
    router.update_layer("second", 4, 4, LoraConfig(use_dora=False))
    modes = {name: module.training for name, module in model.named_modules()}
    apply_plan(model, plan=random_plan(model, evicted=EVICTED))
    assert layer.experts is experts
    assert layer.router is router
    assert experts.r == {"default": 3, "second": 5}
    assert experts.scaling == {"default": 2.0, "second": 2.0}
    assert experts.active_adapters == ["default"]
    assert router.lora_B_router["second"].shape == (6, 4)
    assert router.lora_magnitude_router["default"].shape == (6,)
    assert router.base_layer.num_experts == 6
    trainable = {name for name, parameter in experts.named_parameters() if parameter.requires_grad}
    assert trainable == {f"{name}.default" for name in experts.adapter_layer_names}
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_an_adapter_that_is_not_active_and_the_bare_base_are_cut_too():
    def second(model):
        for layer in moe_layers(model):
            generator = torch.Generator().manual_seed(layer.index)
            layer.experts.update_layer("second", 2, 4, LoraConfig(use_dora=True))
            for parameter in layer.experts.adapter_parameters("second").values():
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
        return model

    def switch(model, adapter):
        for layer in moe_layers(model):
            layer.experts.set_adapter(adapter or "default")
            layer.experts.enable_adapters(adapter is not None)
        return model

    for adapter in ("second", None):
        model = second(adapted_model(QWEN3, packed=False))
        plan = random_plan(model, evicted=EVICTED)
        stock = merged_stock(QWEN3, switch(copy.deepcopy(model), adapter))
        masked = mask_stock_model(stock, rule=ROUTER_RULES["qwen3_moe"], plan=plan)
        apply_plan(model, plan=plan)  # while `default` is active
        torch.testing.assert_close(logits(switch(model, adapter)), logits(masked), rtol=1e-6, atol=1e-6)


def test_an_adapted_layer_takes_no_new_down_rows():
    model = adapted_model(QWEN3, packed=False)
    keep_C = torch.ones(256, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"mlp.experts' has adapters, and a repair refits bare weights"):
        cut_layer(moe_layers(model)[0], keep_C=keep_C, down_rows_CH=torch.zeros(256, 64))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("config", [SMALL, PLAIN_LORA], ids=["dora", "lora"])
def test_statistics_of_an_adapted_model_are_those_of_the_merged_one(config, packed):
    model = adapted_model(QWEN3, packed=packed, config=config)
    merged = merged_stock(QWEN3, model)
    ids = random_tokens(batch=4, length=24)
    mask = torch.ones_like(ids)
    mask[0, 10:] = 0
    loaders = {"text": [{"input_ids": ids, "attention_mask": mask}]}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    mine, theirs = (collect_statistics(one, loaders=loaders, progress=False) for one in (model, merged))
    for own, other in zip(mine.corpora["text"], theirs.corpora["text"], strict=True):
        assert own.keys() == other.keys()
        for name, value in own.items():
            torch.testing.assert_close(value, other[name], rtol=1e-5, atol=1e-6, msg=name)
    for own, other in zip(mine.weights, theirs.weights, strict=True):
        for name, value in own.items():
            torch.testing.assert_close(value, other[name], rtol=1e-5, atol=1e-6, msg=name)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_statistics_of_a_disabled_adapter_are_those_of_the_base():
    model = adapted_model(QWEN3, packed=False)
    for layer in moe_layers(model):
        layer.experts.enable_adapters(False)
        layer.router.enable_adapters(False)
    loaders = {"text": [{"input_ids": random_tokens()}]}
    mine, theirs = (collect_statistics(one, loaders=loaders, progress=False) for one in (model, QWEN3.model()))
    for name, value in mine.corpora["text"][1].items():
        torch.testing.assert_close(value, theirs.corpora["text"][1][name], rtol=1e-5, atol=1e-6, msg=name)


def test_under_autocast_experts_see_its_type_and_sums_stay_wide():
    """As near to fp32 as activations in bf16 are, a few routings among them; the same types."""
    model = adapted_model(QWEN3, packed=False)
    loaders = {"text": [{"input_ids": random_tokens(batch=8, length=32)}]}
    plain = collect_statistics(model, loaders=loaders, progress=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = collect_statistics(model, loaders=loaders, progress=False)
    for name in ("channel_ablation", "hidden_sq", "count", "output_sq"):
        mine, theirs = mixed.corpora["text"][0][name], plain.corpora["text"][0][name]
        assert mine.dtype == theirs.dtype
        assert (mine - theirs).norm() / theirs.norm() < 0.1
        assert name == "count" or not torch.equal(mine, theirs)
