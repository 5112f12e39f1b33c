"""Structures that are damaged, or not those of the model, are refused in words."""

import pytest
import torch
from tiny_models import tiny_model

from lightning_moe.adapters.inject import AdapterConfig, inject_adapters
from lightning_moe.models.discovery import moe_layers
from lightning_moe.quantization.linears import quantize_model
from lightning_moe.surgery.cut import convert_experts, cut_layer, replace_down_rows
from lightning_moe.surgery.structure import ModelStructure, apply_cut, apply_structure, structure_of

pytestmark = pytest.mark.resume


def halved(model, *, first=0, packed=False, rank=0):
    """Every expert loses half of its channels, from `first` on."""
    for layer in moe_layers(model):
        keep = torch.ones(8, 32, dtype=torch.bool)
        keep[:, first : first + 16] = False
        cut_layer(layer, keep_C=keep.flatten())
    if packed:
        quantize_model(model)
    if rank:
        inject_adapters(model, config=AdapterConfig(expert_rank=rank, router_rank=0))
    return model


def damaged(change, **settings):
    content = structure_of(halved(tiny_model(), **settings)).to_dict()
    change(content)
    return content


def set_in(*path, to):
    def change(content):
        *keys, last = path
        for key in keys:
            content = content[key]
        content[last] = to

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_in("more", to=1), r"must hold exactly the keys .*'adapter'.* got .*'more'"),
        (lambda content: content.pop("linears"), "must hold exactly the keys"),
        (
            set_in("version", to=2),
            "structure is of `version` 2, this lightning_moe reads 1. Use the version that wrote",
        ),
        (set_in("hidden_size", to="64"), "`hidden_size` must be a count >= 1, got '64'"),
        (set_in("layers", to=None), "`layers` of a model must be a list, got None"),
        (set_in("layers", to=[]), "`layers` must be at least one layer"),
        (set_in("linears", to=[3]), "`linears` must be names of Linear layers"),
        (set_in("adapter", to="dora"), "`adapter` must be PEFT's settings by name, or null, got 'dora'"),
        (set_in("layers", 0, "name", to=""), "`name` of a layer must be the full name of its experts"),
        (
            set_in("layers", 0, "name", to="a\nb"),
            r"`name` of a layer must be the full name of its experts, got 'a\\nb'",
        ),
        (set_in("layers", 0, "packed", to="no"), "`packed` must be true or false"),
        (set_in("layers", 0, "origin", "widths", to=7), "`widths` must be a list of counts, got 7"),
        (
            set_in("layers", 0, "origin", "widths", to=[32] * 7),
            "mask of the kept channels must have 56 digits, got 64 char",
        ),
        (set_in("layers", 0, "origin", "widths", to=["x"]), "mask of the kept channels must have 0 digits"),
        (set_in("layers", 0, "origin", "kept", to=None), "must have 64 digits, got NoneType"),
        (set_in("layers", 0, "origin", "kept", to="zz" * 32), "mask of the kept channels is not hexadecimal"),
        (set_in("layers", 0, "origin", to={}), r"The origin of .* must hold exactly the keys \['kept'"),
    ],
)
def test_damaged_records_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ModelStructure.from_dict(damaged(change))


def test_bits_beyond_the_channels_are_refused():
    content = damaged(set_in("layers", 0, "origin", "widths", to=[32] * 7 + [31]))
    content["layers"][0]["origin"]["kept"] = "ff" * 32
    with pytest.raises(ValueError, match="bits beyond its 255 channels"):
        ModelStructure.from_dict(content)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"hidden_size": 128}, r"another model: the hidden size is 64 there and 128 here. Name the `source`"),
        (
            {"moe_intermediate_size": 16},
            "the list of widths of 'model.layers.0.mlp.experts' as loaded is",
        ),
        ({"num_experts": 6}, "another model: the list of widths"),
        ({"num_hidden_layers": 3}, "another model: the list of MoE layers is"),
    ],
)
def test_another_source_is_refused(other, message):
    with pytest.raises(ValueError, match=message):
        apply_structure(tiny_model(**other), structure=structure_of(halved(tiny_model())))


def repaired(model):
    for layer in moe_layers(model):
        replace_down_rows(layer.experts, rows_CH=torch.zeros(sum(layer.experts.widths), 64))
    return model


@pytest.mark.parametrize(
    ("there", "here", "message"),
    [
        (
            {"first": 0},
            {"first": 4},
            "another cut than the checkpoint: .* has lost 32 channels",
        ),
        ({"first": 0}, {"first": 0, "packed": True}, "stored in other types than this one: here .* is in 4 bit"),
        ({"packed": True}, {"rank": 2}, "other types than this one: here its adapters are on weights of 16 bit"),
        ({"rank": 2}, {"rank": 3}, "another adapter than the checkpoint: PEFT's `alpha_pattern` is .* here and"),
        ({"first": 0}, {"rank": 2}, "another adapter than the checkpoint"),
    ],
)
def test_what_contradicts_is_refused(there, here, message):
    with pytest.raises(ValueError, match=message):
        apply_structure(halved(tiny_model(), **here), structure=structure_of(halved(tiny_model(), **there)))


def test_a_repair_that_the_checkpoint_has_not_is_refused():
    with pytest.raises(ValueError, match=r"was repaired, the checkpoint not. Resume with the callbacks"):
        apply_cut(repaired(halved(tiny_model())), structure=structure_of(halved(tiny_model())))


def test_a_cut_under_adapters_is_refused():
    model = tiny_model()
    convert_experts(model)
    inject_adapters(model, config=AdapterConfig(expert_rank=2, router_rank=0))
    with pytest.raises(ValueError, match="has adapters already, and 256 channels, not 128"):
        apply_cut(model, structure=structure_of(halved(tiny_model())))


def test_experts_prepared_for_cuts_are_refused_where_the_checkpoint_has_stock_ones():
    model = tiny_model()
    convert_experts(model)
    with pytest.raises(ValueError, match=r"written by a run that pruned nothing, and here .* is prepared for cuts"):
        apply_structure(model, structure=structure_of(tiny_model()))


def test_a_linear_layer_that_is_not_there_is_refused():
    content = structure_of(halved(tiny_model(), packed=True)).to_dict()
    content["linears"].append("model.norm")
    with pytest.raises(ValueError, match=r"'model.norm' is a Linear layer there and Qwen3MoeRMSNorm here"):
        apply_structure(tiny_model(), structure=ModelStructure.from_dict(content))


def test_a_damaged_adapter_is_refused():
    content = structure_of(halved(tiny_model(), rank=2)).to_dict()
    del content["adapter"]["target_modules"]
    with pytest.raises(ValueError, match="The checkpoint's `adapter`' is not the config of a LoRA or DoRA adapter"):
        apply_structure(tiny_model(), structure=ModelStructure.from_dict(content))
