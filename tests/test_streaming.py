"""Streaming a stock folder gives what loading it whole gives, bit for bit, and refuses what it cannot."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import CASES, EVICTED, Case
from random_plans import random_plan
from safetensors.torch import load_file, save_file
from stored_types import restate_type
from tiny_models import random_tokens, tiny_model
from transformers import PreTrainedModel

from lightning_moe import commands
from lightning_moe.commands import exporting
from lightning_moe.export.huggingface import save_ragged
from lightning_moe.export.padded import export_padded
from lightning_moe.models import folders, sources
from lightning_moe.models.discovery import model_shape, moe_layers
from lightning_moe.models.loading import can_stream, load_model
from lightning_moe.models.sources import weight_files
from lightning_moe.models.streaming import StockFolder
from lightning_moe.quantization.linears import quantize_model
from lightning_moe.surgery.cut import apply_plan, convert_experts
from lightning_moe.surgery.streaming import quantize_folder

SHARD = "60KB"  # a tiny model in about ten files


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request) -> Case:
    return request.param


def saved(folder: Path, name: str = "qwen3_moe", *, shard: str = SHARD, **overrides) -> str:
    tiny_model(name, **overrides).save_pretrained(folder, max_shard_size=shard)
    return str(folder)


def assert_same(found: PreTrainedModel, expected: PreTrainedModel) -> None:
    """Every parameter and buffer, quantisation states included, and the logits."""
    assert model_shape(found) == model_shape(expected)
    assert not any(p.requires_grad for p in found.parameters())
    assert found.training is expected.training is False
    own, other = (dict(m.named_parameters()) | dict(m.named_buffers()) | m.state_dict() for m in (found, expected))
    assert list(own) == list(other)
    for name, value in other.items():
        assert own[name].dtype == value.dtype, name
        assert torch.equal(own[name], value), name
    with torch.no_grad():
        assert torch.equal(found(random_tokens()).logits, expected(random_tokens()).logits)


def test_a_cut_stream_equals_load_cut_pack(case, tmp_path) -> None:
    case.model().save_pretrained(tmp_path, max_shard_size=SHARD)
    expected = load_model(str(tmp_path))
    plan = random_plan(expected, evicted=EVICTED)
    apply_plan(expected, plan=plan)
    quantize_model(expected)
    assert_same(quantize_folder(str(tmp_path), plan=plan), expected)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("shard", [SHARD, "1GB"], ids=["shards", "one_file"])
def test_an_uncut_stream_equals_load_convert_pack(dtype, shard, tmp_path) -> None:
    source = saved(tmp_path, "deepseek_v3", shard=shard, tie_word_embeddings=True)
    expected = load_model(source, dtype=dtype)
    convert_experts(expected)
    quantize_model(expected)
    found = quantize_folder(source, dtype=dtype)
    assert_same(found, expected)
    assert found.lm_head.weight is found.model.embed_tokens.weight


def test_experts_are_loaded_in_parts(tmp_path) -> None:
    source = saved(tmp_path)
    expected = moe_layers(load_model(source))[1].experts
    folder = StockFolder(source)
    layer = moe_layers(folder.model)[1]
    chunks = folder.expert_chunks(layer, size=3)
    assert chunks == [(0, 3), (3, 6), (6, 8)]
    for first, last in chunks:
        folder.load_experts(layer, first=first, last=last)
        for name in ("gate_up_proj", "down_proj"):
            assert torch.equal(layer.experts.get_parameter(name), expected.get_parameter(name)[first:last])
    others = [name for name, tensor in folder.model.state_dict().items() if not tensor.is_meta]
    assert others == [f"{layer.name}.gate_up_proj", f"{layer.name}.down_proj"]


def test_experts_stored_as_one_tensor_are_read_in_parts(case, tmp_path) -> None:
    case.model().save_pretrained(tmp_path, save_original_format=False)
    expected = load_model(str(tmp_path))
    folder = StockFolder(str(tmp_path))
    layer = moe_layers(folder.model)[0]
    stock = moe_layers(expected)[0].experts
    assert folder.expert_chunks(layer, size=3) == [(0, 3), (3, 6), (6, 8)]
    folder.load_experts(layer, first=3, last=6)
    for name in ("gate_up_proj", "down_proj"):
        assert torch.equal(layer.experts.get_parameter(name), stock.get_parameter(name)[3:6])
    convert_experts(expected)
    quantize_model(expected)
    assert_same(quantize_folder(str(tmp_path)), expected)


def test_experts_stored_in_an_unknown_way_are_loaded_at_once(tmp_path, monkeypatch) -> None:
    folder = StockFolder(saved(tmp_path, "granitemoe"))
    layer = moe_layers(folder.model)[0]
    (keys,) = folder._keys[f"{layer.name}.down_proj"].values()
    flat = replace(folder._tensors[keys[0]], shape=(8 * 64, 32))  # the first dimension is not the experts
    monkeypatch.setitem(folder._tensors, keys[0], flat)
    assert folder.expert_chunks(layer, size=1) == [(0, 8)]
    asked: dict[str, Any] = {}
    monkeypatch.setattr(folder, "_read", asked.update)
    folder.load_experts(layer, first=0, last=8)
    assert all((part.first, part.last) == (0, None) for part in asked.values())
    assert len(asked) == 2


def test_a_padded_export_with_masked_experts_is_packed(tmp_path) -> None:
    """Its router biases hold -inf, which is no damage: a padded or evicted expert is never chosen."""
    (case,) = (case for case in CASES if case.name == "deepseek_v3_grouped")
    export_padded(case.cut_model(), tmp_path)
    expected = load_model(str(tmp_path))
    biases = [value for name, value in expected.named_buffers() if name.endswith("e_score_correction_bias")]
    assert any(bool(bias.isneginf().any()) for bias in biases)
    convert_experts(expected)
    quantize_model(expected)
    assert_same(quantize_folder(str(tmp_path)), expected)


def test_decoder_layers_are_named_and_loaded_one_by_one(tmp_path) -> None:
    source = saved(tmp_path, "deepseek_v2")
    folder = StockFolder(source)
    assert folder.decoder_names == ["model.layers.0", "model.layers.1", "model.layers.2"]
    folder.load("model.layers.1")
    loaded = {name for name, tensor in folder.model.state_dict().items() if not tensor.is_meta}
    expected = load_model(source).state_dict()
    assert loaded == {name for name in expected if name.startswith("model.layers.1.")}
    assert all(torch.equal(folder.model.state_dict()[name], expected[name]) for name in loaded)


def test_a_folder_loaded_part_by_part_is_the_stock_model(case, tmp_path) -> None:
    case.model(tie_word_embeddings=True).save_pretrained(tmp_path, max_shard_size=SHARD)
    expected = load_model(str(tmp_path))
    folder = StockFolder(str(tmp_path))
    for name in folder.decoder_names:
        folder.load(name)
    found = folder.finish()
    with torch.no_grad():
        assert torch.equal(found(random_tokens()).logits, expected(random_tokens()).logits)
    assert found.lm_head.weight is found.model.embed_tokens.weight


def test_a_tied_weight_may_be_stored_under_either_name(tmp_path) -> None:
    source = saved(tmp_path, shard="1GB", tie_word_embeddings=True)
    edit(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}))
    expected, found = load_model(source), StockFolder(source).finish()
    assert found.lm_head.weight is found.model.embed_tokens.weight
    with torch.no_grad():
        assert torch.equal(found(random_tokens()).logits, expected(random_tokens()).logits)


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def spoil(name: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[5] = float("nan")

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda tensors: tensors.pop("model.norm.weight"),
            r"lacks 1 weights of its model, such as \['model.norm.weight'",
        ),
        (
            lambda tensors: tensors.pop("model.layers.1.mlp.experts.3.up_proj.weight"),
            r"'model.layers.1.mlp.experts.gate_up_proj' is made of 8 tensors `.*` and 7 `.*up_proj.*`, so that some "
            r"are missing in '.*model.safetensors'",
        ),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}),
            "have another shape than its config.json",
        ),
        (
            spoil("model.layers.1.mlp.experts.3.down_proj.weight"),
            r"safetensors' holds NaN or infinity in 'model.layers.1.mlp.experts.3.down_proj.weight': the checkpoint is "
            "damaged. Write or download it again",
        ),
        (spoil("lm_head.weight"), r"model.safetensors' holds NaN or infinity in 'lm_head.weight'"),
    ],
    ids=["missing", "missing_expert", "other_shape", "nan_expert", "nan_head"],
)
def test_a_damaged_folder_is_refused_and_nothing_is_written(change, match, tmp_path) -> None:
    source = saved(tmp_path / "stock", shard="1GB")
    edit(tmp_path / "stock", change)
    with pytest.raises(ValueError, match=match):
        commands.export(model=source, out=str(tmp_path / "out"), formats=["nf4"])
    assert not (tmp_path / "out" / "nf4").exists()


def test_an_overflow_is_blamed_on_the_type_asked_for(tmp_path) -> None:
    source = saved(tmp_path, shard="1GB")
    edit(tmp_path, lambda tensors: tensors["model.layers.1.mlp.experts.3.up_proj.weight"].fill_(1e6))
    assert quantize_folder(source, dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"holds 1e.06 in '.*experts.3.up_proj.weight', which does not fit float16"):
        quantize_folder(source, dtype="float16")


@pytest.mark.parametrize(("dtype", "bits"), [("F4", 4), ("F8_E8M0", 8), ("C64", 64)])
def test_a_stored_type_that_transformers_does_not_know_is_named(dtype, bits, tmp_path) -> None:
    source = saved(tmp_path, shard="1GB")
    restate_type(tmp_path / "model.safetensors", "model.norm.weight", dtype=dtype, bits=bits)
    with pytest.raises(ValueError, match=f"'model.norm.weight' of '.*' is stored as {dtype}, which transformers"):
        quantize_folder(source)


@pytest.mark.parametrize("content", [None, "{nope", '{"temperature": 0.5, "do_sample": true}'])
def test_generation_settings_are_those_of_transformers(content, tmp_path) -> None:
    source = saved(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    if content is not None:
        (tmp_path / "generation_config.json").write_text(content)
    assert quantize_folder(source).generation_config == load_model(source).generation_config


def test_a_truncated_shard_is_named(tmp_path) -> None:
    source = saved(tmp_path)
    file = sorted(tmp_path.glob("*.safetensors"))[4]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"'.*{file.name}' is not a readable file of weights"):
        quantize_folder(source)
    file.unlink()
    with pytest.raises(ValueError, match=f"There is no file of weights at '.*{file.name}'"):
        quantize_folder(source)


def test_a_failing_disk_is_reported_with_the_folder(tmp_path, monkeypatch) -> None:
    folder = StockFolder(saved(tmp_path))

    def fail(*_: Any) -> None:
        raise OSError("input/output error")

    monkeypatch.setattr(folders, "convert_and_load_state_dict_in_model", fail)
    with pytest.raises(ValueError, match=f"The model '{tmp_path}' cannot be loaded: input/output error"):
        folder.load("model.norm")


def test_a_plan_for_another_model_is_refused_before_any_expert_is_read(tmp_path, monkeypatch) -> None:
    source = saved(tmp_path)
    monkeypatch.setattr(StockFolder, "load_experts", None)
    with pytest.raises(ValueError, match=r"made for another model: router_digest"):
        quantize_folder(source, plan=random_plan(tiny_model(seed=1)))
    with pytest.raises(ValueError, match=r"made for another model: widths of model.layers.0.mlp.experts"):
        quantize_folder(source, plan=random_plan(tiny_model(moe_intermediate_size=64)))


def test_a_hidden_size_without_whole_blocks_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="a hidden size that is a multiple of 64, got 96"):
        quantize_folder(saved(tmp_path, hidden_size=96))


def test_what_is_not_stock_is_refused(tmp_path) -> None:
    source = saved(tmp_path / "stock")
    assert can_stream(source)
    save_ragged(quantize_folder(source), tmp_path / "packed")
    assert not can_stream(str(tmp_path / "packed"))
    with pytest.raises(ValueError, match=r"cannot be read part by part as a stock model: it is cut or"):
        quantize_folder(str(tmp_path / "packed"))
    (tmp_path / "stock" / "adapter_config.json").write_text("{}")
    assert not can_stream(source)
    (tmp_path / "stock" / "adapter_config.json").unlink()
    (tmp_path / "stock" / "model.safetensors.index.json").unlink()
    assert not can_stream(source)
    with pytest.raises(ValueError, match="There is no model at '/nowhere/at/all'"):
        can_stream("/nowhere/at/all")


def test_files_are_those_that_transformers_reads(tmp_path) -> None:
    source = saved(tmp_path)
    (tmp_path / "consolidated.safetensors").write_bytes(b"another copy")
    assert weight_files(source) == sorted(tmp_path.glob("model-*.safetensors"))
    saved(tmp_path, shard="1GB")
    assert weight_files(source) == [tmp_path / "model.safetensors"]


def test_a_hub_name_is_asked_for_its_files(tmp_path, monkeypatch) -> None:
    saved(tmp_path / "cache")
    asked: list[str] = []

    def found(source: str, name: str, **_: Any) -> str | None:
        asked.append(source)
        path = tmp_path / "cache" / name
        return str(path) if path.is_file() else None

    monkeypatch.setattr(sources, "cached_file", found)
    monkeypatch.setattr(sources, "get_checkpoint_shard_files", lambda source, index: ([f"{source}/{index}"], None))
    index = tmp_path / "cache" / "model.safetensors.index.json"
    assert weight_files("owner/model") == [Path(f"owner/model/{index}")]
    index.unlink()
    assert weight_files("owner/model") == []
    assert asked == ["owner/model"] * 4


def test_the_export_command_streams(tmp_path, monkeypatch) -> None:
    source = saved(tmp_path / "stock")
    monkeypatch.setattr(exporting, "load_model", None)  # would hold the whole model in 16 bit
    commands.export(model=source, out=str(tmp_path / "exports"), formats=["nf4"])
    assert load_model(str(tmp_path / "exports" / "nf4")).config.quantization_config.packed_experts
