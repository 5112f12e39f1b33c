"""Model folders from somewhere else: none of their code runs, nothing outside is read, no number takes memory."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model

from lightning_moe.export.folders import open_folder
from lightning_moe.export.huggingface import save_ragged
from lightning_moe.export.shards import ShardedWriter
from lightning_moe.files import one_line, open_tensors, read_json
from lightning_moe.models.fp8 import dequantise
from lightning_moe.models.loading import generation_config_of, load_model, read_config
from lightning_moe.models.sources import weight_files
from lightning_moe.quantization.size import read_sizes
from lightning_moe.surgery.cut import convert_experts

EVIL = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n\nclass Evil:\n    pass\n"
AUTO_MAP = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}


@pytest.fixture
def folder(tmp_path) -> Path:
    tiny_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.fixture
def limited():
    """Any large allocation fails: 2 GiB above what the process has."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**31, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize("load", [load_model, open_folder, read_config])
def test_code_beside_a_known_model_is_not_run(folder, load) -> None:
    (folder / "evil.py").write_text(EVIL)
    edit(folder / "config.json", lambda config: config.update(auto_map=AUTO_MAP))
    load(str(folder))
    assert not (folder / "ran").exists()
    assert not any("evil" in name for name in sys.modules)


@pytest.mark.parametrize("load", [load_model, open_folder, read_config])
def test_a_model_that_needs_its_own_code_is_refused_without_asking(folder, load, monkeypatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    (folder / "evil.py").write_text(EVIL)
    edit(folder / "config.json", lambda config: config.update(auto_map=AUTO_MAP, model_type="evil"))
    with pytest.raises(ValueError, match=r"'.*model' brings code of its own.*, which is not run") as refused:
        load(str(folder))
    assert "\n" not in str(refused.value)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("field", ["attn_implementation", "experts_implementation"])
def test_a_checkpoint_does_not_choose_compiled_code_on_the_hub(folder, field) -> None:
    edit(folder / "config.json", lambda config: config.update({field: "somebody/kernel"}))
    with pytest.raises(ValueError, match=rf"`{field}` must be one of transformers' own.* got 'somebody/kernel'"):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_local_experts", 10**12),
        ("num_hidden_layers", 10**6),
        ("vocab_size", 2**40),
        ("hidden_size", 10**30),
        ("num_local_experts", 0),
        ("num_attention_heads", True),
        ("moe_intermediate_size", -1),
    ],
)
def test_counts_beyond_reason_are_refused_from_the_config_alone(folder, field, value, limited) -> None:
    edit(folder / "config.json", lambda config: config.update({field: value}))
    for load in (load_model, open_folder, read_config, lambda source: read_sizes(source, bits=4)):
        with pytest.raises(ValueError, match=rf"`{field.replace('local_', '')}` must be an integer|'{field}'"):
            load(str(folder))


@pytest.mark.parametrize(
    ("field", "value", "name"),
    [
        ("vocab_size", 2**30, "model.embed_tokens.weight"),
        ("moe_intermediate_size", 2**22, "gate_up_proj"),
        ("num_hidden_layers", 999, "999"),
        ("intermediate_size", 2**22, None),  # of dense layers, which this model has not
    ],
)
def test_a_config_of_a_larger_model_is_refused_before_memory_is_taken(folder, field, value, name, limited) -> None:
    edit(folder / "config.json", lambda config: config.update({field: value}))
    if name is None:
        assert load_model(str(folder))
        return
    with pytest.raises(
        ValueError, match=rf"config.json of '.*model' (is of a larger model than its files|says).*{name}"
    ):
        load_model(str(folder))
    with pytest.raises(ValueError, match=r"config.json"):
        open_folder(str(folder))


def test_a_type_that_is_none_is_refused(folder) -> None:
    edit(folder / "config.json", lambda config: config.update(dtype=True))
    with pytest.raises(ValueError, match=r"config.json' holds a value .*`dtype` must be a type of PyTorch.*got True"):
        load_model(str(folder))


@pytest.mark.parametrize("content", ["[1]", '{"max_new_tokens": {"a": 1}}', '{"max_new_tokens": "x"}', "[" * 100_000])
def test_a_damaged_generation_config_is_refused_in_one_line(folder, content) -> None:
    (folder / "generation_config.json").write_text(content)
    for load in (load_model, open_folder, generation_config_of, lambda source: read_sizes(source, bits=16)):
        with pytest.raises(
            ValueError, match=r"generation_config.json' holds a value that generation cannot"
        ) as refused:
            load(str(folder))
        assert "\n" not in str(refused.value)


def test_what_transformers_says_in_several_lines_is_one(folder) -> None:
    edit(folder / "config.json", lambda config: config.update(num_key_value_heads="two"))
    with pytest.raises(ValueError, match=r"config.json' holds a value .*'num_key_value_heads'") as refused:
        load_model(str(folder))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "a/../../other.safetensors", "..\\other"])
def test_an_index_names_no_file_outside_its_folder(tmp_path, name) -> None:
    tiny_model().save_pretrained(tmp_path / "model", max_shard_size="60KB")
    save_file({"model.norm.weight": torch.ones(64)}, tmp_path / "other.safetensors")

    def change(index: dict[str, Any]) -> None:
        index["weight_map"]["model.norm.weight"] = name

    edit(tmp_path / "model" / "model.safetensors.index.json", change)
    for load in (load_model, open_folder, weight_files):
        with pytest.raises(ValueError, match=r"index.json' names a file outside its folder: .*Do not use"):
            load(str(tmp_path / "model"))


def test_an_index_names_files_that_one_line_can_hold(tmp_path) -> None:
    tiny_model().save_pretrained(tmp_path / "model", max_shard_size="60KB")
    index = tmp_path / "model" / "model.safetensors.index.json"
    edit(index, lambda content: content["weight_map"].update({"model.norm.weight": "a\nb"}))
    with pytest.raises(ValueError, match=r"index.json' names a file of unprintable letters: 'a\\nb'. Write"):
        weight_files(str(tmp_path / "model"))


@pytest.mark.parametrize("place", [os.mkdir, os.mkfifo], ids=["directory", "fifo"])
def test_what_is_no_file_is_no_file_of_weights(folder, place) -> None:
    (folder / "model.safetensors").unlink()
    place(folder / "model.safetensors")
    for load in (load_model, open_folder):
        with pytest.raises(ValueError, match=r"model"):
            load(str(folder))


@pytest.mark.parametrize("size", [2**63, 2**64 - 1, 10**9, 100_000_001])
def test_a_header_longer_than_its_file_is_refused(folder, size, limited) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(size.to_bytes(8, "little") + content[8:])
    for load in (load_model, open_folder):
        with pytest.raises(ValueError, match=r"model.safetensors' is not a readable file of weights: .*header"):
            load(str(folder))


@pytest.mark.parametrize(
    "text", ['{"a": ' + "9" * 5000 + "}", "[" * 100_000, '{"a": 1', "\x00"], ids=["digits", "deep", "half", "nul"]
)
def test_json_that_cannot_be_read_is_named_in_one_line(tmp_path, text) -> None:
    (tmp_path / "any.json").write_text(text)
    with pytest.raises(ValueError, match=r"any.json' is not a readable thing: .*\. Write it again\.$") as refused:
        read_json(tmp_path / "any.json", what="thing")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 100_000, "{"])
def test_metadata_that_is_no_json_is_named(tmp_path, value) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "odd.safetensors", metadata={"record": value})
    with pytest.raises(ValueError, match=r"odd.safetensors' is not a readable thing: "):
        open_tensors(tmp_path / "odd.safetensors", what="thing")


def test_messages_of_others_are_one_line_of_bounded_length() -> None:
    assert one_line(ValueError("a\n\tb  c.")) == "a b c"
    assert one_line(KeyError()) == "KeyError"
    assert len(one_line(ValueError("x" * 10_000))) == 300


def test_tensors_are_what_they_were(folder) -> None:
    """The checks above cost nothing: a sound folder loads."""
    expected = load_file(folder / "model.safetensors")["lm_head.weight"]
    assert torch.equal(load_model(str(folder)).get_output_embeddings().weight, expected)


@pytest.mark.parametrize(
    "settings", [{"quant_method": ["fp8"]}, {"quant_method": None, "a": 1}, {"bits": 4}, [1], "fp8"]
)
def test_a_quantisation_without_a_method_is_refused(folder, settings) -> None:
    edit(folder / "config.json", lambda config: config.update(quantization_config=settings))
    for load in (load_model, open_folder):
        with pytest.raises(ValueError, match=r"config.json' holds a value that the model cannot be made with"):
            load(str(folder))


def test_blocks_larger_than_a_weight_take_no_memory(limited) -> None:
    """A block of 2 ** 40 columns is that of the weight."""
    codes_RC, into = torch.ones(3, 4, dtype=torch.float8_e4m3fn), torch.empty(3, 4)
    dequantise(codes_RC, scale=torch.tensor([[2.0]]), block=(2**40, 2**40), first=0, into=into)
    assert torch.equal(into, torch.full((3, 4), 2.0))


@pytest.mark.parametrize(
    ("field", "value"), [("pad_token_id", 10**6), ("hidden_act", ["silu"]), ("num_key_value_heads", 3), ("head_dim", 0)]
)
def test_values_that_a_cut_model_cannot_be_made_with_are_named(tmp_path, field, value) -> None:
    model = tiny_model()
    convert_experts(model)
    save_ragged(model, tmp_path / "model")
    edit(tmp_path / "model" / "config.json", lambda config: config.update({field: value}))
    for load in (load_model, open_folder):
        with pytest.raises(ValueError, match=r"model") as refused:
            load(str(tmp_path / "model"))
        assert "\n" not in str(refused.value)


def test_a_digest_that_is_no_text_is_that_of_no_shard(tmp_path) -> None:
    writer = ShardedWriter(folder=tmp_path / "model", names=("model.layers.0",))
    writer.write(0, {"weight": torch.ones(2)})
    assert writer.done(0)
    next(tmp_path.glob("*.sha256")).write_bytes(b"\xff\xfe")
    assert not writer.done(0)


@pytest.mark.parametrize("load", [load_model, open_folder])
@pytest.mark.parametrize("name", ["other.safetensors", "adapter_model.bin"])
def test_weights_come_from_the_file_that_was_checked(folder, load, name) -> None:
    edit(folder / "config.json", lambda config: config.update(transformers_weights=name))
    tensors = load_file(folder / "model.safetensors")
    save_file({key: value.fill_(float("nan")) for key, value in tensors.items()}, folder / name)
    with pytest.raises(ValueError, match=r"config.json': `transformers_weights` names .* as the file of the weights"):
        load(str(folder))


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("field", ["num_labels", "num_hidden_layers", "head_dim", "qk_rope_head_dim"])
def test_reading_a_config_takes_no_memory_for_its_lists(folder, field, depth, limited) -> None:
    more = {field: 10**9}
    edit(folder / "config.json", lambda config: config.update({"text_config": more} if depth else more))
    with pytest.raises(ValueError, match=rf"config.json' .*`{field}` must be an integer above 0 and at most \d+, got"):
        read_config(str(folder))


@pytest.mark.parametrize("number", [0, -3, 9, 10**9])
def test_a_token_takes_one_to_all_experts(folder, number) -> None:
    edit(folder / "config.json", lambda config: config.update(num_experts_per_tok=number))
    with pytest.raises(ValueError, match="`num_experts_per_tok` must be between 1 and the 8 experts, got"):
        load_model(str(folder))


def test_a_model_folder_does_not_name_another_base(folder, tmp_path) -> None:
    """transformers would load the weights of that base in its place."""
    tiny_model().save_pretrained(tmp_path / "outside")
    content = {"peft_type": "LORA", "r": 1, "target_modules": ["q_proj"]}
    content["base_model_name_or_path"] = str(tmp_path / "outside")
    (folder / "adapter_config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is an adapter, not a model"):
        load_model(str(folder))


def test_a_quantisation_whose_library_is_not_there_is_told(folder) -> None:
    """To evaluate it, whatever transformers can load is read."""
    edit(folder / "config.json", lambda config: config.update(quantization_config={"quant_method": "vptq"}))
    with pytest.raises(ValueError, match=r"cannot be loaded: .*vptq"):
        load_model(str(folder), any_family=True)
