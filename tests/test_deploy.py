"""Exports: every format is written, reloaded and compared, and a broken one is refused."""

import pytest
import torch
from dora_reference import shake
from tiny_models import random_tokens, tiny_model
from tiny_runs import save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_moe.adapters.inject import AdapterConfig, inject_adapters
from lightning_moe.export import writers
from lightning_moe.export.comparing import Probe
from lightning_moe.export.deploy import export_model
from lightning_moe.export.formats import check_targets
from lightning_moe.export.writers import adapters_detached
from lightning_moe.models.channel_experts import ChannelExperts
from lightning_moe.models.discovery import moe_layers
from lightning_moe.models.loading import load_model
from lightning_moe.quantization.linears import quantize_model
from lightning_moe.quantization.nf4 import PackedRows
from lightning_moe.surgery.cut import cut_layer
from lightning_moe.training.tokenization import load_tokenizer


def cut_model(*, packed, dtype=torch.float32):
    model = tiny_model(dtype=dtype)
    for layer in moe_layers(model):
        keep_B = torch.rand(8 * 4, generator=torch.Generator().manual_seed(layer.index)) < 0.5
        keep_B[::4] = True
        cut_layer(layer, keep_C=keep_B.repeat_interleave(8))
    if packed:
        quantize_model(model)
    return model


def adapted(model):
    peft_model = inject_adapters(model, config=AdapterConfig(expert_rank=2, router_rank=2, train_norms=True))
    shake(peft_model, scale=0.02)
    return peft_model


def logits(model):
    with torch.no_grad():
        return model(input_ids=random_tokens()).logits


@pytest.mark.parametrize("packed", [False, True])
def test_the_formats_of_a_model_with_adapters(packed, tmp_path):
    model = cut_model(packed=packed)
    bare = logits(model)
    peft_model = adapted(model)
    trained = logits(model)
    names = [name for name, _ in model.named_parameters()]
    results = export_model(
        model, folder=tmp_path, formats=["adapter", "merged", "merged_nf4", "ragged"], peft_model=peft_model
    )
    assert [result.format for result in results] == ["adapter", "merged", "merged_nf4", "ragged"]
    for result in results:
        assert result.max_logit_diff < 1e-3
        assert result.bytes > 0
    adapter, merged, merged_nf4, ragged = results
    assert (adapter.to_dict()["path"], merged.to_dict()["path"]) == (f"{tmp_path}/adapter", f"{tmp_path}/merged")
    assert merged.adapter is None
    torch.testing.assert_close(logits(load_model(merged.base)), trained, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(logits(load_model(ragged.base)), bare, rtol=1e-3, atol=1e-5)
    assert any(isinstance(module, PackedRows) for module in load_model(merged_nf4.base).modules())
    assert merged_nf4.bytes < merged.bytes
    # The model in training is as it was.
    assert [name for name, _ in model.named_parameters()] == names
    assert torch.equal(logits(model), trained)
    assert not list(tmp_path.glob("tmp*"))


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_nf4_packs_a_dense_model(name, tmp_path):
    (result,) = export_model(tiny_model(name), folder=tmp_path, formats=["nf4"])
    loaded = AutoModelForCausalLM.from_pretrained(result.base)
    assert all(isinstance(layer.experts, ChannelExperts) and layer.experts.packed for layer in moe_layers(loaded))
    assert result.max_logit_diff == pytest.approx(0, abs=1e-5)
    assert loaded.generate(random_tokens(), max_new_tokens=2, do_sample=False).shape == (2, 18)


def test_stock_is_transformers_own_layout(tmp_path):
    model = tiny_model()
    (result,) = export_model(model, folder=tmp_path, formats=["stock"], dtype="bfloat16")
    loaded = AutoModelForCausalLM.from_pretrained(result.base)
    assert loaded.dtype == torch.bfloat16
    assert "quantization_config" not in vars(loaded.config)
    assert model.dtype == torch.float32
    assert 0 < result.max_logit_diff < 0.2
    expected = {name: value.bfloat16() for name, value in model.state_dict().items()}
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())


def test_stock_of_a_cut_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is cut or converted, and export format 'stock' is for uncut models"):
        export_model(cut_model(packed=False), folder=tmp_path, formats=["stock"])
    with pytest.raises(ValueError, match="put `stock` first"):
        export_model(tiny_model(), folder=tmp_path, formats=["ragged", "stock"])
    results = export_model(tiny_model(), folder=tmp_path / "right", formats=["stock", "ragged"])
    assert len(results) == 2


def test_padded_loads_without_this_package(tmp_path):
    (result,) = export_model(cut_model(packed=True), folder=tmp_path, formats=["padded"])
    loaded = AutoModelForCausalLM.from_pretrained(result.base)
    assert not any(isinstance(module, ChannelExperts) for module in loaded.modules())
    assert result.max_logit_diff < 1e-4


def test_a_stored_type_that_rounds_has_a_wider_tolerance(tmp_path):
    model = cut_model(packed=False)
    (result,) = export_model(model, folder=tmp_path, formats=["ragged"], dtype="bfloat16")
    assert 0 < result.max_logit_diff < 0.2
    assert load_model(result.base).dtype == torch.bfloat16
    (whole,) = export_model(model, folder=tmp_path / "whole", formats=["ragged"])
    assert result.bytes < 0.6 * whole.bytes


@pytest.mark.parametrize("packed", [False, True])
def test_a_16_bit_model_with_adapters(packed, tmp_path):
    model = cut_model(packed=packed, dtype=torch.bfloat16)
    peft_model = adapted(model)
    formats = ["adapter", "merged", "merged_nf4", "ragged", "padded"]
    results = export_model(model, folder=tmp_path, formats=formats, peft_model=peft_model)
    by_format = {result.format: result.max_logit_diff for result in results}
    assert by_format["adapter"] == by_format["ragged"] == 0
    assert by_format["merged"] < 0.2


@pytest.mark.parametrize("format", ["adapter", "merged", "merged_nf4", "ragged", "padded", "nf4", "stock"])
def test_a_sabotaged_reload_is_refused(format, tmp_path, monkeypatch):
    def sabotaged(source, **settings):
        model = load_model(source, **settings)
        model.get_output_embeddings().weight.data[7] += 1
        return model

    model = tiny_model() if format == "stock" else cut_model(packed=False)
    peft_model = adapted(model) if format in ("adapter", "merged", "merged_nf4") else None
    monkeypatch.setattr(writers, "load_model", sabotaged)
    with pytest.raises(ValueError, match=r"does not reproduce the model: .* do not ship it"):
        export_model(model, folder=tmp_path, formats=[format], peft_model=peft_model)


def test_a_lost_expert_does_not_hide_behind_the_rounding_of_the_stored_type(tmp_path, monkeypatch):
    def sabotaged(source, **settings):
        model = load_model(source, **settings)
        moe_layers(model)[0].experts.get_parameter("down_proj.weight").data[:8] = 0
        return model

    monkeypatch.setattr(writers, "load_model", sabotaged)
    with pytest.raises(ValueError, match=r"'model.layers.0.mlp.experts.down_proj.weight' differs after the reload"):
        export_model(cut_model(packed=False), folder=tmp_path, formats=["ragged"], dtype="bfloat16")


def test_logits_that_are_not_numbers_are_refused(tmp_path):
    model = cut_model(packed=False)
    model.get_output_embeddings().weight.data[7] = float("nan")
    with pytest.raises(ValueError, match="logits differ by nan"):
        export_model(model, folder=tmp_path, formats=["ragged"])


@pytest.mark.parametrize(
    ("formats", "match"),
    [
        (["adapter"], "Export format 'adapter' needs adapters and the model has none. Use `ragged` or `nf4`"),
        (["merged_nf4"], "'merged_nf4' needs adapters"),
        (["gguf"], "Unknown export format 'gguf'. Known: adapter, merged, merged_nf4, ragged, nf4, padded, uniform"),
        ([], "Name at least one export format"),
        (["nf4", "ragged"], r"'nf4' packs the model in place and must be the last, got \['nf4', 'ragged'\]"),
    ],
)
def test_formats_are_checked_before_anything_is_written(formats, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        export_model(tiny_model(), folder=tmp_path / "out", formats=formats)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", ["ragged", "stock"])
def test_a_folder_with_something_else_is_not_replaced(format, tmp_path):
    (tmp_path / format).mkdir()
    (tmp_path / format / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds something other than a model and would be replaced"):
        export_model(tiny_model(), folder=tmp_path, formats=[format])
    assert (tmp_path / format / "thesis.tex").read_text() == "years of work"
    with pytest.raises(ValueError, match="holds something other than a model and would be replaced"):
        export_model(tiny_model(), folder=tmp_path, formats=["padded", format])
    assert not (tmp_path / "padded").exists()


def test_an_export_of_adapters_may_be_replaced(tmp_path):
    (tmp_path / "adapter" / "base").mkdir(parents=True)
    (tmp_path / "adapter" / "base" / "config.json").write_text("{}")
    check_targets(tmp_path, formats=["adapter", "ragged"])
    (tmp_path / "adapter" / "base" / "config.json").rename(tmp_path / "adapter" / "base" / "thesis.tex")
    with pytest.raises(ValueError, match="base' holds something other than a model"):
        check_targets(tmp_path, formats=["adapter"])


def test_the_tokenizer_goes_with_each_model(tmp_path):
    save_model(tmp_path / "model")
    model = load_model(str(tmp_path / "model"))
    tokenizer = load_tokenizer("asset:small_moe")
    results = export_model(model, folder=tmp_path / "out", formats=["stock", "ragged"], tokenizer=tokenizer)
    for result in results:
        assert AutoTokenizer.from_pretrained(result.base)("print").input_ids == tokenizer("print").input_ids


def test_adapters_come_back_after_an_exception():
    model = cut_model(packed=False)
    adapted(model)
    names = [name for name, _ in model.named_modules()]

    def break_in_between():
        with adapters_detached(model) as bare:
            assert not any("lora" in name or "modules_to_save" in name for name, _ in bare.named_modules())
            raise RuntimeError("in between")

    with pytest.raises(RuntimeError, match="in between"):
        break_in_between()
    assert [name for name, _ in model.named_modules()] == names


def test_probes_are_the_same_each_time_and_keep_the_mode():
    model = tiny_model().train()
    first, second = Probe.of(model), Probe.of(model)
    assert torch.equal(first.logits_BSV, second.logits_BSV)
    assert first.logits_BSV.shape == (2, 32, 128)
    assert [tuple(chosen.shape) for chosen in first.chosen] == [(64, 2), (64, 2)]
    assert model.training


def test_one_line_about_a_result(tmp_path):
    (result,) = export_model(cut_model(packed=False), folder=tmp_path, formats=["ragged"])
    assert result.describe().startswith(f"{tmp_path}/ragged, 0.")
    assert " MB, largest logit difference after reload " in result.describe()
