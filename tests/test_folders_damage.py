"""Damaged and hostile checkpoints: one message each, which names the file; the whole model is refused the same way."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from stored_types import restate_type
from tiny_models import tiny_model
from torch import Tensor

from lightning_moe.commands._sizing import answer_from_config
from lightning_moe.export.folders import open_folder
from lightning_moe.export.huggingface import save_ragged
from lightning_moe.models.loading import load_model, read_config
from lightning_moe.surgery.cut import convert_experts

BOTH = (load_model, open_folder)
INDEX = "model.safetensors.index.json"


@pytest.fixture(params=["stock", "cut"])
def folder(request, tmp_path) -> Path:
    """One file, as transformers writes it and as this package does."""
    model = tiny_model()
    if request.param == "cut":
        convert_experts(model)
        save_ragged(model, tmp_path / "model")
    else:
        model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def shards(tmp_path) -> Path:
    tiny_model().save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    return tmp_path / "shards"


def refuse(folder: Path, match: str, *, loads: tuple[Callable[[str], object], ...] = BOTH) -> None:
    for load in loads:
        with pytest.raises(ValueError, match=match):
            load(str(folder))


def count(source: str) -> None:
    answer_from_config(config_json=source, prune_ratio=0.5)


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any], *, name: str = "model.safetensors") -> None:
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name, metadata={"format": "pt"})


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_missing_shard_is_named(shards) -> None:
    gone = sorted(shards.glob("*.safetensors"))[3]
    gone.unlink()
    refuse(shards, f"There is no file of weights at '.*{gone.name}'")


def test_a_truncated_shard_is_named(shards) -> None:
    short = sorted(shards.glob("*.safetensors"))[3]
    short.write_bytes(short.read_bytes()[:-100])
    refuse(shards, f"'.*{short.name}' is not a readable file of weights")
    short.write_bytes(b"")
    refuse(shards, f"'.*{short.name}' is not a readable file of weights")


def test_a_header_takes_no_memory_for_what_it_says(folder) -> None:
    (folder / "model.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    refuse(folder, "'.*model.safetensors' is not a readable file of weights")
    header = json.dumps({"model.norm.weight": {"dtype": "F32", "shape": [2**50], "data_offsets": [0, 2**52]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    refuse(folder, "'.*model.safetensors' is not a readable file of weights")


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/elsewhere.safetensors", "a\\..\\b.safetensors"])
def test_an_index_that_leaves_its_folder_is_refused(name, shards) -> None:
    edit_json(shards / INDEX, lambda index: index["weight_map"].update({"model.norm.weight": name}))
    refuse(shards, rf"'.*{INDEX}' names a file outside its folder: '.*'\. Do not use this checkpoint")


def test_an_index_that_names_an_absent_file_is_refused(shards) -> None:
    edit_json(shards / INDEX, lambda index: index["weight_map"].update({"model.norm.weight": "gone.safetensors"}))
    refuse(shards, "There is no file of weights at '.*gone.safetensors'")


def test_a_tensor_that_is_not_where_the_index_says_is_named(shards) -> None:
    name = json.loads((shards / INDEX).read_text())["weight_map"]["model.layers.1.mlp.gate.weight"]
    edit(shards, lambda tensors: tensors.pop("model.layers.1.mlp.gate.weight"), name=name)
    refuse(shards, f"'.*{INDEX}' says that '.*{name}' holds 'model.layers.1.mlp.gate.weight', which it does not")


def test_a_tensor_in_two_shards_is_named(shards) -> None:
    first, *_, last = sorted(shards.glob("*.safetensors"))
    (key, value), *_ = load_file(first).items()
    edit(shards, lambda tensors: tensors.update({key: value}), name=last.name)
    refuse(shards, f"'{key}' is both in '.*{first.name}' and in '.*{last.name}'")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("key", ["model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.gate.weight"])
def test_damaged_numbers_are_named_when_they_are_loaded(key, value, folder) -> None:
    edit(folder, lambda tensors: tensors[key].view(-1)[5:6].fill_(float(value)))
    opened = open_folder(str(folder))
    opened.load_decoder("model.layers.0")
    with pytest.raises(ValueError, match=f"'.*model.safetensors' holds NaN or infinity in '{key}': the checkpoint is"):
        opened.load_decoder("model.layers.1")


def test_large_numbers_are_no_damage(folder) -> None:
    """Their sum overflows, they do not."""
    edit(folder, lambda tensors: tensors["model.embed_tokens.weight"].fill_(3e38))
    open_folder(str(folder)).load("model.embed_tokens")


@pytest.mark.parametrize(("value", "dtype"), [(3.4e38, "bfloat16"), (-70000.0, "float16")])
def test_numbers_that_the_type_cannot_hold_are_named(value, dtype, tmp_path) -> None:
    """The largest of bfloat16 is 3.39e38, of float16 65504."""
    key = "model.layers.1.mlp.experts.3.down_proj.weight"
    tiny_model().save_pretrained(tmp_path)
    edit(tmp_path, lambda tensors: tensors[key].view(-1)[5:6].fill_(value))
    open_folder(str(tmp_path), dtype="float32").load_decoder("model.layers.1")
    opened = open_folder(str(tmp_path), dtype=dtype)
    opened.load_decoder("model.layers.0")
    match = rf"'.*model.safetensors' holds {value:.5g}.* in '{key}', which does not fit {dtype}".replace("+", r"\+")
    with pytest.raises(ValueError, match=match):
        opened.load_decoder("model.layers.1")
    load_model(str(tmp_path))
    with pytest.raises(ValueError, match=match):
        load_model(str(tmp_path), dtype=dtype)


def test_a_matrix_of_another_shape_than_its_siblings_is_named(tmp_path) -> None:
    key = "model.layers.1.mlp.experts.0.down_proj.weight"
    tiny_model().save_pretrained(tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({key: tensors[key][1:].clone()}))
    match = rf"'{key}' in '.*model.safetensors' has shape \(63, 32\), most like it, such as .*, have \(64, 32\)"
    refuse(tmp_path, match)


@pytest.mark.parametrize("kind", ["gate_proj", "down_proj"])
def test_matrices_that_are_wrong_in_all_experts_are_named(kind, tmp_path) -> None:
    tiny_model().save_pretrained(tmp_path)

    def narrow(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "layers.1.mlp.experts" in name and kind in name]:
            tensors[name] = tensors[name][:, :-1].clone()

    edit(tmp_path, narrow)
    wrong_width = "have another shape .* such as .'model.layers.1.mlp.experts.down_proj'. in '.*model.safetensors'"
    joined = (
        r"'model.layers.1.mlp.experts.gate_up_proj' should have shape \(8, 64, 64\), which cannot be made of "
        r".*gate_proj.* of shape \(32, 63\) and .*up_proj.* of shape \(32, 64\) in .*model.safetensors"
    )
    refuse(tmp_path, joined if kind == "gate_proj" else wrong_width)


@pytest.mark.parametrize(("value", "is_damage"), [("-inf", False), ("inf", True), ("nan", True)])
def test_a_router_may_mask_an_expert_and_no_more(value, is_damage, tmp_path) -> None:
    tiny_model("deepseek_v3").save_pretrained(tmp_path)
    key = "model.layers.1.mlp.gate.e_score_correction_bias"
    edit(tmp_path, lambda tensors: tensors[key][3:4].fill_(float(value)))
    opened = open_folder(str(tmp_path))
    if not is_damage:
        opened.load_decoder("model.layers.1")
        return
    with pytest.raises(ValueError, match=f"holds NaN or infinity in '{key}'"):
        opened.load_decoder("model.layers.1")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.bool])
def test_integers_are_no_weights(dtype, folder) -> None:
    edit(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(64, dtype=dtype)}))
    refuse(
        folder, r"'model.norm.weight' in '.*model.safetensors' is stored as (I32|I8|BOOL), but it is a weight in float"
    )


def test_complex_numbers_are_no_weights(folder) -> None:
    restate_type(folder / "model.safetensors", "model.norm.weight", dtype="C64", bits=64)
    refuse(folder, "'model.norm.weight' of '.*model.safetensors' is stored as C64, which transformers does not read")


def test_another_shape_than_that_of_the_config_is_named(folder) -> None:
    edit(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}))
    stock = r"1 weights of .* have another shape .* such as \['model.norm.weight'\] in '.*model.safetensors'"
    refuse(folder, rf"{stock}|'model.norm.weight' has shape \(3,\) in '.*model.safetensors', but config.json declares")


@pytest.mark.parametrize("content", ["{nope", "", "\x00"])
def test_a_damaged_config_is_named(content, folder) -> None:
    (folder / "config.json").write_text(content)
    refuse(folder, "'.*config.json' is not a readable model config")


@pytest.mark.parametrize(
    "fields",
    [
        {"num_hidden_layers": "two"},
        {"num_experts": None},
        {"dtype": "float99"},
        {"quantization_config": 5},
        {"rope_parameters": 5},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_values_that_no_model_has_are_refused(fields, folder) -> None:
    edit_json(folder / "config.json", lambda content: content.update(fields))
    refuse(folder, "'.*config.json' holds a value that the model cannot be made with: ", loads=(*BOTH, read_config))


@pytest.mark.parametrize(
    "fields",
    [
        {"num_attention_heads": 0},
        {"hidden_act": "nothing"},
        {"hidden_size": -64},
        {"hidden_size": "64"},
        {"num_hidden_layers": "a"},
        {"vocab_size": -1},
        {"moe_intermediate_size": 0},
    ],
    ids=lambda fields: "-".join(map(str, *fields.items())),
)
def test_values_that_no_layer_has_are_refused_by_name(fields, folder) -> None:
    edit_json(folder / "config.json", lambda content: content.update(fields))
    match = f"'.*config.json' holds a value that the model cannot be made with: (?s:.*){next(iter(fields))}"
    refuse(folder, match, loads=(*BOTH, read_config))
    refuse(
        folder,
        match,
        loads=(partial(load_model, any_family=True), count, lambda source: count(f"{source}/config.json")),
    )


def test_an_unknown_architecture_gets_the_list_of_known_ones(tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba_of_2031"}')
    match = "mamba_of_2031.* does not recognize this architecture.*Supported here: deepseek, .*qwen3_moe"
    refuse(tmp_path, match, loads=(*BOTH, count))


def test_layers_that_no_file_holds_take_no_memory(folder) -> None:
    edit_json(folder / "config.json", lambda content: content.update(num_hidden_layers=999, layer_types=None))
    refuse(folder, "says `num_hidden_layers: 999`, but its files hold", loads=(open_folder,))


def test_another_output_matrix_than_the_config_ties_is_refused(tmp_path) -> None:
    tiny_model().save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", lambda content: content.update(tie_word_embeddings=True))
    refuse(tmp_path, r"ties 'lm_head.weight' to .* but '.*model.safetensors' stores another")
    edit(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    for load in (load_model(str(tmp_path)), open_folder(str(tmp_path)).finish()):
        assert load.lm_head.weight is load.model.embed_tokens.weight


def test_an_output_matrix_that_nothing_holds_is_refused(tmp_path) -> None:
    tiny_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", lambda content: content.update(tie_word_embeddings=False))
    refuse(tmp_path, r"lacks 1 weights .*'lm_head.weight'.* `tie_word_embeddings` must be true in config.json")


def test_a_folder_changed_between_two_reads_is_refused(folder) -> None:
    opened = open_folder(str(folder))
    opened.load_decoder("model.layers.0")
    edit(folder, lambda tensors: tensors["model.norm.weight"].fill_(3))
    with pytest.raises(ValueError, match=r"'.*model.safetensors' was changed while it was being read. Start again"):
        opened.load_decoder("model.layers.1")


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_moe"])
def test_tensors_of_no_weight_are_dropped_and_said_once(name, tmp_path, caplog) -> None:
    tiny_model(name).save_pretrained(tmp_path)
    more = {f"model.layers.61.{part}.weight": torch.ones(2) for part in ("eh_proj", "enorm", "hnorm")}
    edit(tmp_path, lambda tensors: tensors.update(more | {"mtp.fc.weight": torch.ones(2)}))
    opened = open_folder(str(tmp_path))
    assert opened.dropped == (*sorted(more), "mtp.fc.weight")
    opened.finish()
    (line,) = caplog.messages
    assert line == (
        f"'{tmp_path}' stores 4 tensors that are no part of the model (multi-token prediction, say) and are dropped: 3 "
        "of `model.layers.61`: model.layers.61.eh_proj.weight, model.layers.61.enorm.weight and 1 more; 1 of `mtp`: "
        "mtp.fc.weight."
    )


def test_load_model_says_what_transformers_drops_in_silence(tmp_path, caplog) -> None:
    tiny_model("deepseek_v3").save_pretrained(tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({"model.layers.61.enorm.weight": torch.ones(2)}))
    load_model(str(tmp_path))
    assert [line for line in caplog.messages if "1 of `model.layers.61`: model.layers.61.enorm.weight" in line]
