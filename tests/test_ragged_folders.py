"""Ragged folders: what is written, and what a damaged or hostile one is answered with."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_plans import random_plan
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_moe.export.huggingface import ChannelMoeConfig, quantization_config_of, save_ragged
from lightning_moe.models.channel_experts import DenseRows
from lightning_moe.models.discovery import model_shape, moe_layers
from lightning_moe.models.loading import load_model
from lightning_moe.quantization.linears import quantize_model
from lightning_moe.quantization.nf4 import pack_experts
from lightning_moe.surgery.cut import apply_plan

FIRST = "model.layers.0.mlp.experts"


def cut_model(name: str = "qwen3_moe", *, packed: bool = False, evicted: Any = ((1,),)) -> PreTrainedModel:
    overrides = {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 2} if name.endswith("grouped") else {}
    model = tiny_model(name, **overrides)
    apply_plan(model, plan=random_plan(model, evicted=evicted))
    if packed:
        quantize_model(model)
    return model


@pytest.fixture
def folder(tmp_path) -> Path:
    save_ragged(cut_model(), tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads((folder / "config.json").read_text())
    change(content["quantization_config"])
    (folder / "config.json").write_text(json.dumps(content))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def refuse(folder: Path, match: str) -> None:
    """Both ways to load refuse the folder with the same words."""
    for load in (AutoModelForCausalLM.from_pretrained, load_model):
        with pytest.raises(ValueError, match=match):
            load(str(folder))


def test_config_is_plain_and_complete(folder) -> None:
    written = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert set(written) == {"quant_method", "widths", "packed_experts", "packed_linears"}
    assert written["quant_method"] == "channel_moe"
    assert written["packed_experts"] is False
    assert written["packed_linears"] == []
    assert {name: tuple(widths) for name, widths in written["widths"].items()} == {
        layer.name: layer.widths for layer in model_shape(load_model(str(folder))).layers
    }
    assert sorted(file.name for file in folder.parent.iterdir()) == ["model"]


@pytest.mark.parametrize(
    ("widths", "match"),
    [
        ([-1] + [4] * 6, r"must be a list of integers >= 0, got \[-1, 4"),
        (["8"] * 7, "must be a list of integers >= 0"),
        ([True] * 7, "must be a list of integers >= 0"),
        ([1.5] * 7, "must be a list of integers >= 0"),
        ("32", "must be a list of integers >= 0"),
        (None, "must be a list of integers >= 0"),
        ([10**30] + [4] * 6, "has experts of at most 32 channels, got 1000"),
        ([0] + [4] * 6, "at most 8 experts, each of width >= 1"),
        ([4] * 9, "at most 8 experts, each of width >= 1"),
        ([4], "needs top_k=2 experts, got 1 widths"),
        ([], "needs top_k=2 experts, got 0 widths"),
        ([4] * 7, r"'model.layers.0.mlp.* has shape .* but config.json declares \(28, 64\)"),
        ([4] * 6, "has shape .* but config.json declares"),
    ],
)
def test_hostile_widths_are_refused(folder, widths, match) -> None:
    edit_config(folder, lambda config: config["widths"].update({FIRST: widths}))
    refuse(folder, match)


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("widths", [1, 2], "must map names of experts modules to lists"),
        ("widths", {}, r"declares widths for other experts modules than the model has: \['model.layers.0.mlp.experts'"),
        ("widths", {"nothing.there": [4]}, "declares widths for other experts modules"),
        ("packed_experts", "yes", "`packed_experts` in config.json must be true or false, got 'yes'"),
        ("packed_linears", "q_proj", "`packed_linears` in config.json must be a list of module names"),
        ("packed_linears", [3], "`packed_linears` in config.json must be a list of module names"),
        (
            "packed_linears",
            ["nothing.there"],
            r"`packed_linears` names \['nothing.there'\], which are no Linear layers",
        ),
        ("packed_linears", ["model.norm"], "which are no Linear layers"),
        (
            "packed_linears",
            ["model.layers.0.self_attn.q_proj"],
            r"q_proj\.weight' has shape \(64, 64\) in .*, but config\.json declares \(2048, 1\)",
        ),
        ("packed_experts", True, "lack the tensor .*gate_proj.codes"),
    ],
)
def test_hostile_fields_are_refused(folder, field, value, match) -> None:
    edit_config(folder, lambda config: config.update({field: value}))
    refuse(folder, match)


def test_missing_widths_are_refused(folder) -> None:
    edit_config(folder, lambda config: config.pop("widths"))
    refuse(folder, "declares widths for other experts modules than the model has")


def test_a_grouped_router_keeps_all_its_experts(tmp_path) -> None:
    save_ragged(cut_model("deepseek_v3_grouped"), tmp_path / "model")
    name = "model.layers.1.mlp.experts"
    edit_config(tmp_path / "model", lambda config: config["widths"].update({name: [4] * 7}))
    refuse(tmp_path / "model", "has a grouped router, which keeps all 8 experts")
    edit_config(tmp_path / "model", lambda config: config["widths"].update({name: [0, 0, 0] + [4] * 5}))
    refuse(tmp_path / "model", "only 1 of 8 can be reached")


def test_a_missing_tensor_is_named(folder) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop(f"{FIRST}.up_proj.weight"))
    refuse(folder, f"lack the tensor '{FIRST}.up_proj.weight'")


def test_a_tensor_of_another_shape_is_named(folder) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}))
    refuse(folder, r"'model.norm.weight' has shape \(3,\) in .* but config.json declares \(64,\)")


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "nf4"])
def test_a_truncated_file_is_named(packed, tmp_path) -> None:
    save_ragged(cut_model(packed=packed), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    refuse(tmp_path / "model", "'.*model.safetensors' is not a readable file of weights: .*Write or download it again")


def test_packed_linears_of_another_size_are_refused(tmp_path) -> None:
    save_ragged(cut_model(packed=True), tmp_path / "model")
    name = "model.layers.0.self_attn.q_proj.weight"
    edit_tensors(tmp_path / "model", lambda tensors: tensors.update({name: tensors[name][:7].clone()}))
    refuse(tmp_path / "model", "q_proj.weight' has shape")


def test_a_stock_model_is_not_saved_as_ragged(tmp_path) -> None:
    with pytest.raises(ValueError, match=f"'{FIRST}' is not cut: only a cut model"):
        save_ragged(tiny_model(), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_half_packed_models_are_not_saved(tmp_path) -> None:
    model = cut_model()
    pack_experts(moe_layers(model)[1].experts)
    with pytest.raises(ValueError, match=r"1 of 2 expert layers are in 4 bit, such as 'model\.layers\.1"):
        save_ragged(model, tmp_path / "model")


def test_the_model_is_left_as_it_was(tmp_path) -> None:
    model = cut_model()
    quantizer = model.hf_quantizer
    save_ragged(model, tmp_path / "first")
    assert "quantization_config" not in vars(model.config)
    assert model.hf_quantizer is quantizer
    quantize_model(model)
    save_ragged(model, tmp_path / "packed")
    assert "quantization_config" not in vars(model.config)
    save_ragged(cut_model(), tmp_path / "packed")
    first, second = (sorted((tmp_path / name).iterdir()) for name in ("first", "packed"))
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second]


def test_a_failed_save_leaves_the_old_folder_and_the_model(folder, monkeypatch) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    model = load_model(str(folder))
    config = model.config.quantization_config

    def fail(self: PreTrainedModel, path: Path, **kwargs: Any) -> None:
        Path(path).mkdir()
        (Path(path) / "config.json").write_text("half")
        raise RuntimeError("disk full")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        save_ragged(model, folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [file.name for file in folder.parent.iterdir()] == ["model"]
    assert model.config.quantization_config is config


def test_a_folder_of_something_else_is_not_replaced(tmp_path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something other than a model and would be replaced"):
        save_ragged(cut_model(), tmp_path)
    with pytest.raises(ValueError, match=r"notes.txt' is a file; a model needs a folder"):
        save_ragged(cut_model(), tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_loaded_model_cut_again_is_described_anew_by_a_plain_save(folder, tmp_path) -> None:
    model = load_model(str(folder))
    apply_plan(model, plan=random_plan(model, evicted=((0,), (2,)), seed=3))
    model.save_pretrained(tmp_path / "again")
    assert model_shape(load_model(str(tmp_path / "again"))) == model_shape(model)


def test_loaded_rows_are_aligned_for_grouped_products(tmp_path) -> None:
    for name in ("qwen2_moe", "qwen3_moe", "deepseek"):
        save_ragged(cut_model(name), tmp_path / name)
        loaded = load_model(str(tmp_path / name))
        assert not {m.weight.data_ptr() % 16 for m in loaded.modules() if isinstance(m, DenseRows)} - {0}


def test_a_packed_folder_has_the_stated_size(tmp_path) -> None:
    model = cut_model(packed=True)
    config = quantization_config_of(model)
    assert config.packed_experts
    assert len(config.packed_linears) == 8
    assert (
        ChannelMoeConfig(**{k: v for k, v in config.to_dict().items() if k != "quant_method"}).widths == config.widths
    )
    save_ragged(model, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    packed_bytes = sum(value.nbytes for name, value in tensors.items() if ".experts." in name)
    channels = model_shape(model).num_channels
    assert packed_bytes == 3 * channels * (64 // 2 + 1 + 4)
    assert config.to_diff_dict() == config.to_dict()
    assert not config.is_quantizable()


def test_copies_share_the_quantizer(folder) -> None:
    """Transformers copies it for every stored tensor: with the widths of all layers that would be quadratic."""
    quantizer = load_model(str(folder)).hf_quantizer
    assert copy.deepcopy([quantizer])[0] is quantizer


def test_widths_are_plain_numbers_by_module_name() -> None:
    widths = quantization_config_of(cut_model()).widths
    assert list(widths) == [FIRST, "model.layers.1.mlp.experts"]
    assert all(isinstance(width, int) for values in widths.values() for width in values)
