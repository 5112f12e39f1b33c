"""The structure of a model: read off, stored, and given to a freshly loaded source."""

import copy
import json
import pickle

import pytest
import torch
from random_plans import random_plan
from tiny_models import random_tokens, tiny_model

from lightning_moe.adapters.inject import AdapterConfig, inject_adapters
from lightning_moe.models.channel_experts import ChannelExperts, Origin
from lightning_moe.models.discovery import moe_layers
from lightning_moe.quantization.linears import quantize_model
from lightning_moe.quantization.nf4 import unpack_experts
from lightning_moe.surgery.cut import apply_plan, convert_experts, cut_layer, replace_down_rows
from lightning_moe.surgery.structure import ModelStructure, apply_cut, apply_structure, structure_of

pytestmark = pytest.mark.resume

FAMILIES = ("qwen3_moe", "deepseek_v2", "deepseek_v2_grouped", "deepseek_v3_grouped", "ernie4_5_moe")
ADAPTER = AdapterConfig(expert_rank=2, router_rank=8, attention_rank=2, train_norms=True)


EVICTED = ((1,), (6,))


def small(name="qwen3_moe"):
    """Groups of four experts, where there are groups: one of them can leave."""
    groups = {"n_group": 2, "topk_group": 2} if name.endswith("grouped") else {}
    return tiny_model(name, **groups)


def cut(model, *, seed=0, evicted=EVICTED):
    """A random cut that also removes an expert of each layer."""
    apply_plan(model, plan=random_plan(model, seed=seed, evicted=evicted))
    return model


def through_json(structure):
    return ModelStructure.from_dict(json.loads(json.dumps(structure.to_dict())))


def tensors(model):
    return model.state_dict()


def assert_same_tensors(model, expected):
    mine, theirs = tensors(model), tensors(expected)
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(mine[name], value), name


@pytest.mark.parametrize("name", FAMILIES)
def test_a_cut_is_given_to_the_source(name):
    pruned, fresh = cut(small(name)), small(name)
    apply_structure(fresh, structure=through_json(structure_of(pruned)))
    assert_same_tensors(fresh, pruned)
    tokens = random_tokens()
    assert torch.equal(fresh(tokens).logits, pruned(tokens).logits)


@pytest.mark.parametrize("name", FAMILIES)
def test_two_cuts_are_given_as_one(name):
    pruned, fresh = cut(small(name)), small(name)
    cut(pruned, seed=1, evicted=())
    apply_structure(fresh, structure=through_json(structure_of(pruned)))
    assert_same_tensors(fresh, pruned)


def adapted(name="qwen3_moe", *, after=None):
    """Cut, packed, adapted, and perhaps cut once more."""
    model = cut(small(name))
    quantize_model(model)
    inject_adapters(model, config=ADAPTER)
    if after is not None:
        for layer in moe_layers(model):
            widths = layer.base_experts.widths
            keep = [torch.arange(width) >= after for width in widths]
            cut_layer(layer, keep_C=torch.cat(keep))
    return model


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen2_moe", "deepseek_v2_grouped"])
def test_packing_and_adapters_are_given_to_the_source(name):
    model, fresh = adapted(name), small(name)
    peft_model = apply_structure(fresh, structure=through_json(structure_of(model)))
    assert peft_model is not None
    assert [n for n, p in fresh.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]
    fresh.load_state_dict(tensors(model))
    tokens = random_tokens()
    assert torch.equal(fresh(tokens).logits, model(tokens).logits)


def test_ranks_are_the_noted_ones_where_a_cut_lowered_their_limit():
    model = adapted()
    structure = structure_of(model)
    assert structure.adapter["rank_pattern"][r"mlp\.gate"] == 7  # eight experts less one when the adapter was made
    fresh = small()
    cut(fresh)
    apply_cut(fresh, structure=structure)
    apply_structure(fresh, structure=structure)
    (rank,) = {layer.router.r["default"] for layer in moe_layers(fresh)}
    assert rank == 7


@pytest.mark.parametrize("make", [lambda: small(), lambda: cut(small()), adapted])
def test_what_is_there_already_is_left_as_it_is(make):
    model = make()
    modules = dict(model.named_modules())
    assert apply_structure(model, structure=through_json(structure_of(model))) is None
    after = dict(model.named_modules())
    assert after.keys() == modules.keys()
    assert all(after[name] is module for name, module in modules.items())


def test_the_cut_alone_neither_packs_nor_adapts():
    model, fresh = adapted(), small()
    apply_cut(fresh, structure=structure_of(model))
    assert [layer.experts.widths for layer in moe_layers(fresh)] == [
        layer.base_experts.widths for layer in moe_layers(model)
    ]
    assert not any(layer.experts.packed for layer in moe_layers(fresh))
    assert structure_of(fresh).adapter is None


def test_a_packed_source_stays_packed():
    packed, fresh = small(), small()
    for model in (packed, fresh):
        convert_experts(model)
        quantize_model(model)
    cut(packed)
    apply_structure(fresh, structure=through_json(structure_of(packed)))
    assert_same_tensors(fresh, packed)


def test_4_bit_linears_take_their_block_statistics_along():
    """bitsandbytes saves them in a state dict and does not load them: codes of one layer, scales of another."""
    model, other = small(), tiny_model(seed=1)
    for each in (model, other):
        convert_experts(each)
        quantize_model(each)
    other.load_state_dict(model.state_dict())
    assert_same_tensors(other, model)
    assert torch.equal(other(random_tokens()).logits, model(random_tokens()).logits)


def test_stock_experts_stay_stock():
    structure = structure_of(small())
    assert all(layer.origin is None and not layer.packed for layer in structure.layers)
    fresh = small()
    apply_structure(fresh, structure=structure)
    assert not any(isinstance(layer.experts, ChannelExperts) for layer in moe_layers(fresh))


def test_a_mask_takes_a_bit_per_channel():
    layer = structure_of(cut(small())).layers[0]
    assert len(layer.to_dict()["origin"]["kept"]) == 8 * 32 // 4


def test_the_origin_follows_its_experts():
    model = cut(small())
    kept = [layer.experts.origin.kept_C for layer in moe_layers(model)]
    quantize_model(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(
            torch.equal(layer.experts.origin.kept_C, k) for layer, k in zip(moe_layers(copied), kept, strict=True)
        )
    inject_adapters(model, config=ADAPTER)
    layer = moe_layers(model)[0]
    assert torch.equal(layer.experts.merged_experts(dtype=torch.float32).origin.kept_C, kept[0])
    unpack_experts(layer.base_experts, dtype=torch.float32)
    assert torch.equal(layer.base_experts.origin.kept_C, kept[0])


def test_new_down_rows_are_noted_and_stay_noted():
    model = cut(small())
    experts = moe_layers(model)[0].experts
    replace_down_rows(experts, rows_CH=torch.randn(sum(experts.widths), experts.hidden_size))
    cut(model, seed=1, evicted=())
    assert [layer.origin.refitted for layer in through_json(structure_of(model)).layers] == [True, False]


def test_the_origin_of_an_empty_model_is_not_on_the_meta_device():
    with torch.device("meta"):
        origin = Origin.whole([3, 2])
    assert origin.kept_C.tolist() == [True] * 5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"widths": (3, -1)}, r"`widths` must be counts >= 0"),
        (
            {"kept_C": torch.ones(4, dtype=torch.bool)},
            r"`kept_C` must be bool of shape \(5,\), got torch.bool",
        ),
        ({"kept_C": torch.ones(5)}, r"`kept_C` must be bool of shape \(5,\), got torch.float32"),
        ({"refitted": 1}, "`refitted` a truth value, got .* and 1"),
    ],
)
def test_a_bad_origin_is_refused(values, message):
    given = {"widths": (3, 2), "kept_C": torch.ones(5, dtype=torch.bool)} | values
    with pytest.raises(ValueError, match=message):
        Origin(**given)
