"""Reading checkpoints layer by layer: what is loaded, given back and loaded again is what the whole model holds."""

import pytest
import torch
from family_cases import CASES, EVICTED, Case
from layer_folders import assert_equal, loaded, walk_and_compare
from random_plans import random_plan
from tiny_models import tiny_model

from lightning_moe.models.discovery import model_shape, moe_layers
from lightning_moe.models.loading import load_model
from lightning_moe.models.streaming import StockFolder
from lightning_moe.surgery.cut import convert_experts, cut_layer

SHARD = "60KB"  # a tiny model in about ten files


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request) -> Case:
    return request.param


@pytest.mark.parametrize("fused", [False, True], ids=["by_expert", "fused"])
def test_a_stock_folder_layer_by_layer(case, fused, tmp_path) -> None:
    model = case.model(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size=SHARD, save_original_format=not fused)
    expected = load_model(str(tmp_path))
    convert_experts(expected)
    walk_and_compare(StockFolder(str(tmp_path)), expected)


def test_a_cut_layer_is_given_back_and_loaded_again(case, tmp_path) -> None:
    case.model().save_pretrained(tmp_path)
    expected = load_model(str(tmp_path))
    plan = random_plan(expected, evicted=EVICTED)
    convert_experts(expected)
    folder = StockFolder(str(tmp_path))
    shape = model_shape(folder.model)
    for layer in moe_layers(folder.model):
        name = layer.block_name.rpartition(".")[0]
        before = folder.model.get_submodule(name)
        folder.load_decoder(name)
        cut_layer(moe_layers(folder.model)[layer.index], keep_C=plan.keep[layer.index])
        folder.release(name)
        assert folder.model.get_submodule(name) is before
        assert loaded(folder) == []
        folder.load_decoder(name)
        assert_equal(folder.model.get_submodule(name), expected.get_submodule(name))
        folder.release(name)
    assert model_shape(folder.model) == shape


def test_a_released_module_that_was_replaced_is_the_stock_one_again(tmp_path) -> None:
    tiny_model().save_pretrained(tmp_path)
    folder = StockFolder(str(tmp_path))
    (name, *_) = folder.decoder_names
    experts = moe_layers(folder.model)[0].experts
    folder.load_decoder(name)
    folder.release(f"{name}.mlp.experts")
    assert type(moe_layers(folder.model)[0].experts) is type(experts)


def test_tied_weights_come_and_go_together(tmp_path) -> None:
    tiny_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    folder = StockFolder(str(tmp_path))
    for name in ("lm_head", "model.embed_tokens"):
        folder.load(name)
        assert sorted(loaded(folder)) == ["lm_head.weight", "model.embed_tokens.weight"]
        assert folder.model.lm_head.weight is folder.model.model.embed_tokens.weight
        folder.release(name)
        assert loaded(folder) == []


def test_buffers_are_computed_once(case, tmp_path) -> None:
    case.model().save_pretrained(tmp_path)
    folder = StockFolder(str(tmp_path))
    folder.compute_buffers()
    expected = dict(load_model(str(tmp_path)).named_buffers())
    computed = {name: value for name, value in folder.model.named_buffers() if not value.is_meta}
    assert computed
    assert all(torch.equal(value, expected[name]) for name, value in computed.items())


def test_the_fingerprint_tells_checkpoints_apart(tmp_path) -> None:
    def fingerprint(name: str, **overrides) -> str:
        tiny_model(**overrides).save_pretrained(tmp_path / name, max_shard_size=SHARD)
        return StockFolder(str(tmp_path / name)).fingerprint

    first = fingerprint("first")
    assert len(first) == 64
    assert first == fingerprint("second")
    assert first != fingerprint("third", rope_theta=5.0)
    assert first != fingerprint("fourth", dtype=torch.bfloat16)
