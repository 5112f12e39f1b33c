"""Settings of adapters from somewhere else: PEFT would follow them to modules, regular expressions and memory."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_model

from lightning_moe.adapters.inject import AdapterConfig, inject_adapters
from lightning_moe.adapters.settings import checked_settings
from lightning_moe.adapters.storage import add_adapter, load_adapter, save_adapter
from lightning_moe.surgery.cut import convert_experts


def model_to_adapt() -> Any:
    model = tiny_model()
    convert_experts(model)
    return model


@pytest.fixture
def adapter(tmp_path) -> Path:
    save_adapter(inject_adapters(model_to_adapt(), config=AdapterConfig(expert_rank=2)), folder=tmp_path / "adapter")
    return tmp_path / "adapter"


ODD = [
    ("r", 10**9, r"`r` is 1000000000, which is no value of it \(ranks are 1 to 64\)"),
    ("r", True, "`r` is True, which is no value"),
    ("r", -1, "`r` is -1, which is no value"),
    ("rank_pattern", {"mlp\\.experts": 10**9}, "`rank_pattern` is .*, which is no value"),
    ("alpha_pattern", {"mlp\\.experts": float("nan")}, "`alpha_pattern` is .*, which is no value"),
    ("lora_alpha", "x", "`lora_alpha` is 'x', which is no value"),
    ("lora_alpha", float("inf"), "`lora_alpha` is inf, which is no value"),
    ("lora_dropout", 1.5, "`lora_dropout` is 1.5, which is no value"),
    ("use_dora", "yes", "`use_dora` is 'yes', which is no value"),
    ("modules_to_save", [3], r"`modules_to_save` is \[3\], which is no value"),
    ("bias", "all", "`bias` is 'all', which is no value"),
    ("init_lora_weights", "pissa", "`init_lora_weights` is 'pissa', which is no value"),
    ("layers_to_transform", ["a"], "`layers_to_transform` is .*, which is no value"),
    ("target_modules", 3, "`target_modules` is 3, which is no value"),
    ("target_modules", "(a+)+$", "`target_modules` is .*, which is no value"),
    ("target_modules", "x{1000}", "`target_modules` is .*, which is no value"),
    ("layer_replication", [[0, 1000]], r"`layer_replication` is \[\[0, 1000\]\], which this package does not read"),
    ("megatron_config", {"a": 1}, "`megatron_config` is .*, which this package does not read"),
    ("loftq_config", {"loftq_bits": 4}, "`loftq_config` is .*, which this package does not read"),
    ("eva_config", {"rho": 2}, "`eva_config` is .*, which this package does not read"),
    ("trainable_token_indices", [1], "`trainable_token_indices` is .*, which this package does not read"),
    ("use_qalora", True, "`use_qalora` is True, which this package does not read"),
]


@pytest.mark.parametrize(("field", "value", "match"), ODD, ids=[f"{field}-{value}"[:40] for field, value, _ in ODD])
def test_settings_are_checked_before_peft_sees_them(adapter, field, value, match) -> None:
    content = json.loads((adapter / "adapter_config.json").read_text()) | {field: value}
    (adapter / "adapter_config.json").write_text(json.dumps(content))
    model = model_to_adapt()
    with pytest.raises(ValueError, match=rf"adapter_config.json': {match}"):
        load_adapter(model, folder=adapter)
    with pytest.raises(ValueError, match=rf"The checkpoint's `adapter`': {match}"):
        add_adapter(model, settings=content)
    assert "peft_config" not in vars(model)


def test_parts_that_the_model_has_not_are_told(adapter) -> None:
    content = json.loads((adapter / "adapter_config.json").read_text()) | {"target_modules": "no\\.such"}
    (adapter / "adapter_config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"adapter_config.json' names parts that the model has not, or .*no\\\.such"):
        load_adapter(model_to_adapt(), folder=adapter)


def test_settings_are_a_mapping() -> None:
    with pytest.raises(ValueError, match="'here' is not the config of a LoRA or DoRA adapter"):
        checked_settings([1], largest_rank=4, source="here")


@pytest.mark.parametrize(
    "pattern", [".*self_attn\\.(q_proj|v_proj)$", "^model\\.layers\\.\\d+\\.mlp\\.gate$", "a|b|(c|d)e"]
)
def test_patterns_that_people_write_are_read(pattern) -> None:
    content = {"peft_type": "LORA", "target_modules": pattern}
    assert checked_settings(content, largest_rank=4, source="here")["target_modules"] == pattern


@pytest.mark.parametrize("pattern", ["(a|a)" * 5, "((a))", "(a)*", "a*" * 5, "(?:a)", "a)(", "[a]", "x" * 100_001])
def test_patterns_that_could_take_for_ever_are_refused(pattern) -> None:
    with pytest.raises(ValueError, match=r"`target_modules` is '.*, which is no value of it"):
        checked_settings({"peft_type": "LORA", "target_modules": pattern}, largest_rank=4, source="here")
