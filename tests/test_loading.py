"""load_model: which sources it takes and what it refuses."""

import json
import logging
from pathlib import Path

import pytest
import torch
from random_plans import random_plan
from safetensors.torch import load_file, save_file
from tiny_models import random_tokens, tiny_model
from transformers import AutoModelForCausalLM

from lightning_moe.export.huggingface import save_ragged
from lightning_moe.models.loading import can_stream, load_model
from lightning_moe.models.sources import weight_files
from lightning_moe.surgery.cut import apply_plan


@pytest.fixture
def folder(tmp_path) -> Path:
    tiny_model(tie_word_embeddings=True).save_pretrained(tmp_path / "stock")
    return tmp_path / "stock"


def test_a_stock_folder_is_loaded_in_the_asked_type(folder) -> None:
    model = load_model(str(folder))
    expected = tiny_model(tie_word_embeddings=True)
    with torch.no_grad():
        assert torch.equal(model(random_tokens()).logits, expected(random_tokens()).logits)
    assert not model.training
    assert load_model(str(folder), dtype="bfloat16").dtype == torch.bfloat16


def test_from_scratch_takes_the_shape_alone(folder) -> None:
    (folder / "model.safetensors").unlink()
    model = load_model(str(folder), from_scratch=True)
    assert model.dtype == torch.float32
    assert load_model(str(folder), from_scratch=True, dtype="bfloat16").dtype == torch.bfloat16
    assert model.config.num_hidden_layers == 2


def test_the_shipped_shape_loads_by_its_asset_name() -> None:
    assert load_model("asset:small_moe", from_scratch=True).config.model_type == "qwen3_moe"


def test_a_home_folder_is_expanded(folder, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert load_model("~/stock").config.model_type == "qwen3_moe"


@pytest.mark.parametrize("source", ["/nowhere/at/all", "./nothing", "~/nothing", "prunedd"])
def test_a_folder_without_a_model_is_refused(source) -> None:
    with pytest.raises(ValueError, match=f"There is no model at '{source}': no folder with a config.json"):
        load_model(source)


def test_an_unknown_asset_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing_shipped"):
        load_model("asset:nothing_shipped")


def test_a_damaged_config_is_refused(folder) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"'.*stock/config.json' is not a readable model config: .*Write it again"):
        load_model(str(folder))


def test_a_family_without_experts_is_refused(folder) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"model_type": "llama"}))
    with pytest.raises(ValueError, match="'llama' is not a known Mixture-of-Experts family"):
        load_model(str(folder))


def test_absent_weights_are_refused(folder) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"'.*stock' has no safetensors files"):
        load_model(str(folder))


def test_truncated_weights_are_refused(folder) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"'.*model.safetensors' is not a readable file of weights"):
        load_model(str(folder))


INDEX = {"metadata": {}, "weight_map": {"model.norm.weight": "model.safetensors"}}


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{nope", "is not a readable index of shards: "),
        ("[]", "is not an index of shards: it must hold `weight_map`, a file name for each weight"),
        (json.dumps({"metadata": {}}), "is not an index of shards"),
        (json.dumps({"weight_map": INDEX["weight_map"]}), "is not an index of shards"),
        (json.dumps(INDEX | {"weight_map": []}), "is not an index of shards"),
        (json.dumps(INDEX | {"weight_map": {"model.norm.weight": 5}}), "is not an index of shards"),
    ],
)
def test_a_damaged_index_of_shards_is_named(content, match, folder) -> None:
    (folder / "model.safetensors").rename(folder / "shard.safetensors")
    (folder / "model.safetensors.index.json").write_text(content)
    for use in (load_model, weight_files, can_stream):
        with pytest.raises(ValueError, match=f"'.*model.safetensors.index.json' {match}"):
            use(str(folder))


def test_missing_weights_are_named(folder) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights of its model, such as \['model.norm.weight'\]"):
        load_model(str(folder))


def test_a_missing_expert_is_refused(folder, caplog, monkeypatch) -> None:
    monkeypatch.setattr(logging.getLogger("transformers.modeling_utils"), "handlers", [caplog.handler])
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.experts.3.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"gate_up_proj' is made of 8 tensors .* and 7 .*up_proj"):
        load_model(str(folder))
    assert "Traceback" not in caplog.text


def test_running_out_of_memory_is_not_a_bad_model(folder, monkeypatch) -> None:
    def no_memory(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", no_memory)
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        load_model(str(folder))


def test_weights_of_another_shape_are_named(folder) -> None:
    tensors = load_file(folder / "model.safetensors") | {"model.norm.weight": torch.ones(3)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 weights .* have another shape .* such as \['model.norm.weight'\]"):
        load_model(str(folder))


def test_ragged_folders_load_the_same_way(tmp_path) -> None:
    model = tiny_model("deepseek")
    apply_plan(model, plan=random_plan(model))
    save_ragged(model, tmp_path / "cut")
    with torch.no_grad():
        assert torch.equal(load_model(str(tmp_path / "cut"))(random_tokens()).logits, model(random_tokens()).logits)
