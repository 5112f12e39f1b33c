"""Folders of cut models, layer by layer: what is loaded is what `load_model` loads."""

import json
from pathlib import Path

import pytest
import torch
from family_cases import CASES, Case
from layer_folders import assert_equal, loaded, walk_and_compare
from random_plans import random_plan
from tiny_models import tiny_model

from lightning_moe.export.folders import RaggedFolder, open_folder
from lightning_moe.export.huggingface import save_ragged
from lightning_moe.models.discovery import moe_layers
from lightning_moe.models.loading import DtypeName, load_model
from lightning_moe.surgery.cut import apply_plan, cut_layer
from lightning_moe.surgery.novices import Novices


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request) -> Case:
    return request.param


@pytest.mark.parametrize("packed", [False, True], ids=["ragged", "nf4"])
def test_a_cut_folder_layer_by_layer(case, packed, tmp_path) -> None:
    model = case.cut_model(packed=packed, dtype=torch.bfloat16, tie_word_embeddings=True)
    save_ragged(model, tmp_path / "cut")
    folder = open_folder(str(tmp_path / "cut"))
    assert isinstance(folder, RaggedFolder)
    walk_and_compare(folder, load_model(str(tmp_path / "cut")))


def test_a_folder_in_shards_with_novices_in_another_type(tmp_path) -> None:
    model = tiny_model("qwen2_moe")
    plan = random_plan(model, evicted=((1, 6), (3,)))
    rows = tuple(torch.randn(number, 64) for number in (2, 1))
    apply_plan(model, plan=plan, novices=Novices(plan_digest=plan.digest, rows=rows))
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    asked: tuple[DtypeName, ...] = ("auto", "bfloat16")
    for dtype in asked:
        expected = load_model(str(tmp_path), dtype=dtype)
        assert [layer.experts.novice_experts for layer in moe_layers(expected)] == [(1, 6), (3,)]
        walk_and_compare(open_folder(str(tmp_path), dtype=dtype), expected)


def test_a_layer_cut_again_is_given_back(case, tmp_path) -> None:
    save_ragged(case.cut_model(packed=True), tmp_path / "cut")
    folder, expected = open_folder(str(tmp_path / "cut")), load_model(str(tmp_path / "cut"))
    plan = random_plan(expected, seed=1)
    for layer in moe_layers(folder.model):
        name = layer.block_name.rpartition(".")[0]
        folder.load_decoder(name)
        cut_layer(moe_layers(folder.model)[layer.index], keep_C=plan.keep[layer.index])
        folder.release(name)
        assert loaded(folder) == []
        folder.load_decoder(name)
        assert_equal(folder.model.get_submodule(name), expected.get_submodule(name))
        folder.release(name)


def test_a_loaded_folder_is_saved_under_the_same_names(tmp_path) -> None:
    save_ragged(tiny_cut(), tmp_path / "cut")
    model = open_folder(str(tmp_path / "cut")).finish()
    model.save_pretrained(tmp_path / "again")
    files = [sorted((tmp_path / name).iterdir()) for name in ("cut", "again")]
    assert [file.name for file in files[0]] == [file.name for file in files[1]]
    assert (tmp_path / "cut" / "model.safetensors").read_bytes() == (
        tmp_path / "again" / "model.safetensors"
    ).read_bytes()


def tiny_cut(name: str = "qwen3_moe"):
    model = tiny_model(name)
    apply_plan(model, plan=random_plan(model))
    return model


def edit_config(folder: Path, **fields) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | fields))


def test_hostile_widths_are_refused_as_by_load_model(tmp_path) -> None:
    save_ragged(tiny_cut(), tmp_path / "cut")
    content = json.loads((tmp_path / "cut" / "config.json").read_text())["quantization_config"]
    content["widths"]["model.layers.0.mlp.experts"] = [4] * 8
    edit_config(tmp_path / "cut", quantization_config=content)
    for load in (load_model, open_folder):
        with pytest.raises(ValueError, match=r"'model.layers.0.mlp.* has shape .* but config.json declares \(32, 64\)"):
            load(str(tmp_path / "cut"))


def test_who_reads_a_folder(tmp_path) -> None:
    tiny_model().save_pretrained(tmp_path / "stock")
    assert type(open_folder(str(tmp_path / "stock"))).__name__ == "StockFolder"
    assert open_folder(str(tmp_path / "stock"), dtype="bfloat16").model.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"is no cut model \(`quant_method` is None\): read it with `open_folder`"):
        RaggedFolder(str(tmp_path / "stock"))


@pytest.mark.parametrize("method", ["gptq", "awq", "mxfp4", "compressed-tensors", "bitsandbytes", "nothing"])
def test_other_quantisations_are_refused_by_name(method, tmp_path) -> None:
    tiny_model().save_pretrained(tmp_path)
    edit_config(tmp_path, quantization_config={"quant_method": method, "bits": 4, "load_in_4bit": True})
    with pytest.raises(ValueError, match=f"is quantised with '{method}' .* Supported: weights in 16 or 32 bit, 8-bit"):
        open_folder(str(tmp_path))


def test_adapters_are_refused_by_name(tmp_path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is an adapter, not a model. Merge it into its model first"):
        open_folder(str(tmp_path))


def test_nothing_is_unpickled(tmp_path) -> None:
    tiny_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    for load in (open_folder, load_model):
        with pytest.raises(ValueError, match=r"has no safetensors files.* not read: they could run code.* converts"):
            load(str(tmp_path))
