"""Numbers in config.json that no model of its family has: a model of them would load, and answer nonsense."""

import json
from pathlib import Path
from re import escape
from typing import Any

import pytest
from tiny_models import MODEL_NAMES, tiny_model
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lightning_moe.commands._sizing import answer_from_config
from lightning_moe.export.folders import open_folder
from lightning_moe.models.config_values import check_values
from lightning_moe.models.families import FAMILIES
from lightning_moe.models.loading import load_model, read_config

NAN, INFINITY = float("nan"), float("inf")
PUBLISHED = sorted((Path(__file__).parent / "model_configs").glob("*.json"))
SHARE, POSITIVE, NOT_NEGATIVE = (
    "of at least 0 and below 1",
    "above 0 and at most 1e+06",
    "of at least 0 and at most 1e+06",
)
RANGES = [
    ("qwen3_moe", "rms_norm_eps", SHARE, (NAN, INFINITY, -1e-6, 5.0)),
    ("qwen3_moe", "rope_theta", "of at least 1 and at most 1e+15", (NAN, 0, -1e4, 1e-300, 1e300, "a")),
    ("qwen3_moe", "initializer_range", NOT_NEGATIVE, (NAN, -0.02, 1e30)),
    ("qwen3_moe", "router_aux_loss_coef", NOT_NEGATIVE, (NAN, -0.001, INFINITY)),
    ("qwen3_moe", "attention_dropout", SHARE, (NAN, -0.5, 1.0, 2.0)),
    ("glm4_moe", "partial_rotary_factor", "above 0 and at most 1", (NAN, 0, -0.5, 2.0)),
    ("deepseek_v3", "routed_scaling_factor", POSITIVE, (NAN, 0.0, -2.5)),
    ("deepseek_v2", "aux_loss_alpha", NOT_NEGATIVE, (NAN, -1.0)),
    ("granitemoe", "logits_scaling", POSITIVE, (NAN, 0.0, -6.0)),
    ("granitemoe", "residual_multiplier", POSITIVE, (0.0, -0.2, INFINITY)),
    ("granitemoe", "attention_multiplier", POSITIVE, (NAN, -0.1)),
    ("granitemoe", "embedding_multiplier", POSITIVE, (NAN, 0.0)),
    ("mixtral", "router_jitter_noise", SHARE, (NAN, -0.1, 1.0)),
    ("olmoe", "clip_qkv", POSITIVE, (NAN, 0.0, -8.0)),
    ("ernie4_5_moe", "moe_norm_min", SHARE, (NAN, -1e-12)),
]


def write_config(folder: Path, *, family: str = "qwen3_moe", **fields: Any) -> str:
    """The config of a tiny model, without weights."""
    folder.mkdir(exist_ok=True)
    tiny_model(family).config.save_pretrained(folder)
    return edit_config(folder, **fields)


def edit_config(folder: Path, **fields: Any) -> str:
    content = json.loads((folder / "config.json").read_text())
    if {"rope_theta", "partial_rotary_factor", "rope_scaling"} & fields.keys():  # older names, as they are published
        content.pop("rope_parameters", None)
    (folder / "config.json").write_text(json.dumps(content | fields))
    return str(folder)


def refuse(folder: Path, *, told: str, family: str = "qwen3_moe", **fields: Any) -> None:
    source = write_config(folder, family=family, **fields)
    begin = f"'{folder / 'config.json'}' holds a value that the model cannot be made with: "
    with pytest.raises(ValueError, match=f"^{escape(begin + told)}. Write or download it again.$"):
        read_config(source)


@pytest.mark.parametrize(
    ("family", "field", "allowed", "value"),
    [(family, field, allowed, value) for family, field, allowed, values in RANGES for value in values],
)
def test_a_number_out_of_its_range_is_refused_by_name(tmp_path, family, field, allowed, value) -> None:
    told = f"`{field}` must be a number {allowed}, got {value!r}"
    refuse(tmp_path, told=told, family=family, **{field: value})


@pytest.mark.parametrize("factor", [NAN, 0, -2.0, "a"])
def test_a_number_out_of_its_range_is_found_inside_of_others(tmp_path, factor) -> None:
    told = f"`factor` must be a number above 0 and at most 1e+06, got {factor!r}"
    refuse(tmp_path, told=told, rope_scaling={"rope_type": "linear", "factor": factor})


@pytest.mark.parametrize("value", [NAN, [1.0, -INFINITY], {"deep": [{"number": INFINITY}]}])
def test_what_is_no_number_is_refused_wherever_it_is(tmp_path, value) -> None:
    source = write_config(tmp_path, some_field=value)
    with pytest.raises(ValueError, match=r"config.json' .*`(some_field|number)` must be finite, got (nan|-?inf)"):
        read_config(source)


def test_a_name_from_the_file_stays_on_one_line(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"`a\\nb` must be finite, got nan"):
        read_config(write_config(tmp_path, **{"a\nb": NAN}))


def test_infinity_means_no_limit_where_transformers_says_so() -> None:
    """`granitemoehybrid`, say, a family that somebody may register, has it in its own config."""
    config = tiny_model().config
    config.time_step_limit = (0.0, INFINITY)
    check_values(config, source="config.json")
    config.time_step_limit = (0.0, NAN)
    with pytest.raises(ValueError, match="`time_step_limit` must be finite, got nan"):
        check_values(config, source="config.json")


@pytest.mark.parametrize(
    ("family", "fields", "told"),
    [
        ("qwen3_moe", {"num_key_value_heads": 3}, "`num_key_value_heads` must be a divisor of `num_attention_h"),
        ("qwen3_next", {"linear_num_value_heads": 3}, "`linear_num_key_heads` must be a divisor of `linear_num_v"),
        ("qwen3_next", {"linear_num_key_heads": 0}, "`linear_num_key_heads` must be an integer above 0"),
        ("qwen3_next", {"head_dim": 15}, "`head_dim` must be even: positions turn pairs of channels, got 15"),
        ("deepseek_v3", {"qk_rope_head_dim": 7}, "`qk_rope_head_dim` must be even: positions turn pairs"),
        ("mixtral", {"sliding_window": 0}, "`sliding_window` must be an integer above 0"),
        ("qwen3_moe", {"max_position_embeddings": -1}, "`max_position_embeddings` must be an integer above 0"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "`decoder_sparse_step` must be an integer above 0"),
        ("deepseek_v3", {"norm_topk_prob": None}, "`norm_topk_prob` must be true or false, got None"),
        ("deepseek_v3", {"n_group": 3}, "`n_group` must be a divisor of `n_routed_experts`, 8, got 3"),
        ("glm4_moe", {"n_group": 0}, "`n_group` must be an integer above 0"),
        ("glm4_moe", {"topk_group": 9}, "`topk_group` must be between 1 and the 1 groups of experts, got 9"),
        ("deepseek_v3_grouped", {"topk_group": 1}, "`num_experts_per_tok` must be between 1 and the 2 experts, got 3"),
        ("deepseek_v2", {"topk_method": "best"}, "`topk_method` must be greedy or group_limited_greedy, got 'best'"),
        ("ernie4_5_moe", {"moe_k": 9}, "`moe_k` must be between 1 and the 8 experts, got 9"),
    ],
)  # fmt: skip
def test_numbers_that_do_not_fit_each_other_are_refused_by_name(tmp_path, family, fields, told) -> None:
    source = write_config(tmp_path, family=family, **fields)
    with pytest.raises(ValueError, match=f"config.json' holds a value .*(: |field ){told}") as refused:
        read_config(source)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("value", ["yes", 5, NAN, [True]])
def test_a_switch_is_true_or_false(tmp_path, value) -> None:
    source = write_config(tmp_path, norm_topk_prob=value)
    with pytest.raises(ValueError, match=r"config.json' holds a value .*'norm_topk_prob'"):
        read_config(source)


def test_groups_that_a_router_does_not_use_are_no_bound(tmp_path) -> None:
    fields = {"n_group": 3, "topk_group": 1, "num_experts_per_tok": 8, "topk_method": "greedy"}
    assert read_config(write_config(tmp_path, family="deepseek_v2", **fields)).n_group == 3


def test_every_reader_of_a_config_refuses_it(tmp_path) -> None:
    tiny_model().save_pretrained(tmp_path)
    source = edit_config(tmp_path, rms_norm_eps=NAN)
    readers = (
        load_model,
        open_folder,
        lambda source: load_model(source, from_scratch=True),
        lambda source: load_model(source, any_family=True),
        lambda source: answer_from_config(config_json=source, prune_ratio=0.5),
        lambda source: answer_from_config(config_json=f"{source}/config.json", prune_ratio=0.5),
    )
    for read in readers:
        with pytest.raises(ValueError, match="`rms_norm_eps` must be a number of at least 0 and below 1, got nan"):
            read(source)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_family_s_own_defaults_are_allowed(family) -> None:
    config = CONFIG_MAPPING[family]()
    if family.startswith("deepseek") and config.num_experts_per_tok is None:
        config.num_experts_per_tok = 6  # the one field that transformers leaves open
    check_values(config, source="config.json")


@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.stem)
def test_published_configs_are_allowed(file) -> None:
    check_values(AutoConfig.from_pretrained(file), source=str(file))


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_configs_are_allowed_as_they_are_saved(tmp_path, name) -> None:
    assert read_config(write_config(tmp_path, family=name)).model_type in FAMILIES
