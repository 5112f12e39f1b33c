"""`config.json` of stock exports in the words that engines and transformers 4 read: written down by hand."""

import json

import pytest
import torch
from random_plans import uniform_plan
from test_export_uniform import dropped_plan
from tiny_models import FAMILY_NAMES, random_tokens, tiny_model

from lightning_moe.export.deploy import export_model
from lightning_moe.export.stock_config import older_fields
from lightning_moe.models.loading import load_model
from lightning_moe.surgery.cut import apply_plan

# Names of the number of experts, of the channels of one and of the experts of a token.
_NAMES = {
    "qwen2_moe": ("num_experts", "moe_intermediate_size", "num_experts_per_tok"),
    "qwen3_moe": ("num_experts", "moe_intermediate_size", "num_experts_per_tok"),
    "qwen3_next": ("num_experts", "moe_intermediate_size", "num_experts_per_tok"),
    "mixtral": ("num_local_experts", "intermediate_size", "num_experts_per_tok"),
    "olmoe": ("num_experts", "intermediate_size", "num_experts_per_tok"),
    "granitemoe": ("num_local_experts", "intermediate_size", "num_experts_per_tok"),
    "deepseek": ("n_routed_experts", "moe_intermediate_size", "num_experts_per_tok"),
    "deepseek_v2": ("n_routed_experts", "moe_intermediate_size", "num_experts_per_tok"),
    "deepseek_v3": ("n_routed_experts", "moe_intermediate_size", "num_experts_per_tok"),
    "glm4_moe": ("n_routed_experts", "moe_intermediate_size", "num_experts_per_tok"),
    "ernie4_5_moe": ("moe_num_experts", "moe_intermediate_size", "moe_k"),
}
_PARTIAL = {"glm4_moe": 0.5, "qwen3_next": 0.25}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}


def exported(folder, name, format="uniform", **settings):
    """A stock export: the model, the folder and its config."""
    model = tiny_model(name, **settings)
    if format != "stock":
        apply_plan(model, plan=uniform_plan(model, width=16))
    (result,) = export_model(model, folder=folder, formats=[format])
    with open(f"{result.base}/config.json", encoding="utf-8") as file:
        return model, result.base, json.load(file)


@torch.no_grad()
def logits_of(model):
    return model(input_ids=random_tokens(), use_cache=False).logits


@pytest.mark.parametrize("format", ["uniform", "padded", "stock"])
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_older_readers_find_what_they_look_for(name, format, tmp_path):
    model, base, config = exported(tmp_path, name, format, rope_theta=1e6)
    width = 32 if format == "stock" else 16
    assert config["rope_theta"] == 1e6
    assert [config[field] for field in _NAMES[name]] == [8, width, 2]
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert config.get("partial_rotary_factor") == _PARTIAL.get(name)
    assert "rope_scaling" not in config
    assert config["rope_parameters"]["rope_theta"] == 1e6
    torch.testing.assert_close(logits_of(load_model(base)), logits_of(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "glm4_moe"])
def test_scaled_positions_are_said_in_both_ways(name, tmp_path):
    model, base, config = exported(tmp_path, name, rope_parameters=dict(_YARN))
    scaling = {field: value for field, value in _YARN.items() if field != "rope_theta"}
    assert config["rope_scaling"] == {"type": "yarn", **scaling}
    assert config["rope_theta"] == 1e6
    loaded = load_model(base)
    assert loaded.config.rope_parameters["rope_theta"] == 1e6
    torch.testing.assert_close(logits_of(loaded), logits_of(model), rtol=1e-4, atol=1e-5)


def test_a_config_without_positions_gets_none():
    assert older_fields({"model_type": "mixtral", "num_local_experts": 8}) == {}
    assert older_fields({"model_type": "qwen3_moe", "num_local_experts": 6, "dtype": "bfloat16"}) == {
        "num_experts": 6,
        "torch_dtype": "bfloat16",
    }


def test_an_export_that_is_cut_again_says_what_it_then_is(tmp_path):
    """Fields that were added to the source do not come back with old values."""
    _, base, _ = exported(tmp_path / "first", "qwen3_moe", rope_parameters=dict(_YARN))
    model = load_model(base)
    apply_plan(model, plan=dropped_plan(model, dropped=(1, 6)))
    (result,) = export_model(model, folder=tmp_path / "second", formats=["uniform"], source=base)
    with open(f"{result.base}/config.json", encoding="utf-8") as file:
        config = json.load(file)
    assert (config["num_experts"], config["num_local_experts"], config["moe_intermediate_size"]) == (6, 6, 16)
    assert config["rope_scaling"]["factor"] == config["rope_parameters"]["factor"] == 4
    assert (config["rope_theta"], config["rope_parameters"]["rope_theta"]) == (1e6, 1e6)
