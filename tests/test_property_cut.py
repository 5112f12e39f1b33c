"""Cuts of random models by random plans: a mask, in any order with packing, in one go or two, and told again."""

# E experts, C channels of a layer

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from property_models import DTYPES, GROUPED, UNGROUPED, assert_same_tensors, logits_of, model_cases
from property_strategies import cases, plan_of, seeds
from reference_moe import mask_stock_model
from tiny_models import tiny_model

from lightning_moe.export.huggingface import save_ragged
from lightning_moe.models.discovery import model_shape, moe_layers
from lightning_moe.models.loading import load_model
from lightning_moe.quantization.linears import quantize_model
from lightning_moe.quantization.nf4 import pack_experts
from lightning_moe.records import PrunePlan
from lightning_moe.surgery.cut import apply_plan, convert_experts
from lightning_moe.surgery.feasibility import unpruned_shape
from lightning_moe.surgery.structure import ModelStructure, apply_structure, structure_of

pytestmark = pytest.mark.property


@pytest.mark.parametrize("names", [UNGROUPED, GROUPED], ids=["ungrouped", "grouped"])
def test_a_cut_is_the_mask(names):
    @given(case=model_cases(names=names), seed=seeds)
    @cases(25)
    def check(case, seed):
        model, plan = case.model(), case.plan(seed=seed)
        reference = mask_stock_model(case.model(), rule=case.rule, plan=plan)
        apply_plan(model, plan=plan)
        torch.testing.assert_close(logits_of(model), logits_of(reference), rtol=1e-4, atol=1e-5)

    check()


@given(case=model_cases(dtypes=DTYPES), seed=seeds)
@cases(20)
def test_packing_and_cutting_change_places(case, seed):
    plan = case.plan(seed=seed)
    first_packed, first_cut = case.model(), case.model()
    convert_experts(first_packed)
    for layer in moe_layers(first_packed):
        pack_experts(layer.experts)
    apply_plan(first_packed, plan=plan)
    apply_plan(first_cut, plan=plan)
    for layer in moe_layers(first_cut):
        pack_experts(layer.experts)
    assert_same_tensors(first_packed, first_cut)


@given(case=model_cases(dtypes=DTYPES), seed=seeds)
@cases(20)
def test_two_cuts_are_one_cut_of_the_union(case, seed):
    twice, once, first = case.model(), case.model(), case.plan(seed=seed, share=0.8)
    whole = model_shape(twice)
    apply_plan(twice, plan=first)
    second = plan_of(model_shape(twice), seed=seed + 1, share=0.5)
    apply_plan(twice, plan=second)
    keep = []
    for keep_C, then_C in zip(first.keep, second.keep, strict=True):
        left = [channel for channel, kept in enumerate(keep_C.tolist()) if kept]
        final = {channel for channel, kept in zip(left, then_C.tolist(), strict=True) if kept}
        keep.append(torch.tensor([channel in final for channel in range(len(keep_C))]))
    union = PrunePlan(shape=whole, method="both", prune_ratio=0.5, align=1, keep=tuple(keep), provenance={})
    apply_plan(once, plan=union)
    assert_same_tensors(twice, once)
    assert unpruned_shape(twice).layers == whole.layers
    assert structure_of(twice).to_dict() == structure_of(once).to_dict()
    assert torch.equal(logits_of(twice), logits_of(once))


@given(case=model_cases(dtypes=DTYPES), seed=seeds)
@cases(20)
def test_the_structure_of_a_cut_model_is_its_plan(case, seed):
    cut, fresh, plan = case.model(), case.model(), case.plan(seed=seed)
    apply_plan(cut, plan=plan)
    structure = ModelStructure.from_dict(json.loads(json.dumps(structure_of(cut).to_dict())))
    kept = tuple(layer.origin.kept_C for layer in structure.layers)
    told = PrunePlan(
        shape=plan.shape, method=plan.method, prune_ratio=plan.prune_ratio, align=1, keep=kept, provenance={}
    )
    assert told.digest == plan.digest
    apply_structure(fresh, structure=structure)
    assert_same_tensors(fresh, cut)
    assert model_shape(fresh) == model_shape(cut)
    apply_structure(fresh, structure=structure)  # there already
    assert_same_tensors(fresh, cut)


@given(case=model_cases(), seed=seeds)
@cases(10)
def test_keeping_everything_changes_nothing(case, seed):
    model = case.model()
    expected = logits_of(model)
    shape = model_shape(model)
    keep = tuple(torch.ones(layer.num_channels, dtype=torch.bool) for layer in shape.layers)
    whole = PrunePlan(shape=shape, method="none", prune_ratio=0.0, align=1, keep=keep, provenance={})
    apply_plan(model, plan=whole)
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-5, atol=1e-6)
    assert model_shape(model) == shape


def test_a_router_that_needs_two_experts_is_not_left_with_one():
    model = tiny_model("deepseek_v3", num_experts_per_tok=1)
    shape = model_shape(model)
    keep = tuple(torch.arange(layer.num_channels) < layer.widths[0] for layer in shape.layers)
    plan = PrunePlan(shape=shape, method="one", prune_ratio=0.5, align=1, keep=keep, provenance={})
    with pytest.raises(ValueError, match=r"'deepseek_v3' always looks for its two best experts, and the plan keeps 1"):
        apply_plan(model, plan=plan)


@given(case=model_cases(dtypes=DTYPES), seed=seeds)
@cases(6)
@pytest.mark.parametrize("packed", [False, True], ids=["16 bit", "nf4"])
def test_a_cut_model_comes_back_from_its_folder(packed, case, seed):
    model = case.model()
    apply_plan(model, plan=case.plan(seed=seed))
    if packed:
        quantize_model(model)
    with tempfile.TemporaryDirectory() as folder:
        save_ragged(model, Path(folder))
        loaded = load_model(folder, dtype=str(case.dtype).removeprefix("torch."))
        assert_same_tensors(loaded, model)
        assert model_shape(loaded) == model_shape(model)
        assert torch.equal(logits_of(loaded), logits_of(model))
