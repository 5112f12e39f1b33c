"""What an export stores in which type: 16 bit where it is wanted, and out of 4 bit where the format promises it."""

import json

import pytest
import torch
from dora_reference import shake
from random_plans import random_plan, uniform_plan
from safetensors.torch import load_file
from test_export_uniform import dropped_plan
from tiny_models import random_tokens, tiny_model

from lightning_moe.adapters.inject import AdapterConfig, inject_adapters
from lightning_moe.export.deploy import export_model
from lightning_moe.export.manifest import MANIFEST_NAME, THROUGH_4_BIT, read_manifest
from lightning_moe.models.discovery import moe_layers
from lightning_moe.models.loading import load_model
from lightning_moe.quantization.linears import dense_weight, quantize_model
from lightning_moe.quantization.unpacked import is_packed
from lightning_moe.surgery.cut import apply_plan


def cut_model(plan=random_plan, name="qwen3_moe", *, packed=False, dtype=torch.float32):
    model = tiny_model(name, dtype=dtype)
    apply_plan(model, plan=plan(model))
    if packed:
        quantize_model(model)
    return model


def uniform(model):
    return uniform_plan(model, width=16)


def dropped(model):
    return dropped_plan(model, dropped=(1, 6))


@torch.no_grad()
def logits_of(model):
    return model(input_ids=random_tokens(), use_cache=False).logits


@pytest.mark.parametrize(("format", "plan"), [("uniform", uniform), ("expert_dropped", dropped), ("padded", uniform)])
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_stock_layouts_are_stored_in_the_wanted_type(format, plan, name, tmp_path):
    model = cut_model(plan, name)
    (result,) = export_model(model, folder=tmp_path, formats=[format], dtype="bfloat16")
    tensors = {
        key: value for file in (tmp_path / format).glob("*.safetensors") for key, value in load_file(file).items()
    }
    kept = {key for key, value in tensors.items() if value.dtype != torch.bfloat16}
    assert all(key.endswith("e_score_correction_bias") for key in kept)
    assert bool(kept) == (name == "deepseek_v3")
    assert torch.equal(tensors["lm_head.weight"], model.get_output_embeddings().weight.bfloat16())
    assert load_model(result.base).dtype == torch.bfloat16
    assert 0 < result.median_logit_diff < 0.05
    manifest = read_manifest(tmp_path / format)
    assert manifest is not None
    assert manifest.bits["experts"] == 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ragged_of_a_packed_model_is_unpacked(dtype, tmp_path):
    model = cut_model(packed=True, dtype=dtype)
    before = logits_of(model)
    (result,) = export_model(model, folder=tmp_path, formats=["ragged"], dtype="bfloat16")
    loaded = load_model(result.base)
    assert not is_packed(loaded)
    assert loaded.dtype == torch.bfloat16
    assert is_packed(model)  # the one in memory stays as it is
    assert torch.equal(logits_of(model), before)
    for one, other in zip(moe_layers(model), moe_layers(loaded), strict=True):
        found = other.experts.expert_matrices(0, dtype=torch.bfloat16)
        expected = one.experts.expert_matrices(0, dtype=dtype)
        assert all(torch.equal(each, packed.bfloat16()) for each, packed in zip(found, expected, strict=True))
    name = "model.layers.0.self_attn.q_proj"
    expected = dense_weight(model.get_submodule(name)).to(dtype).bfloat16()
    assert torch.equal(loaded.get_submodule(name).get_parameter("weight"), expected)


@pytest.mark.parametrize("format", ["ragged", "padded", "uniform"])
def test_weights_that_went_through_4_bit_are_said_to_have(format, tmp_path):
    model = cut_model(uniform, packed=True)
    (result,) = export_model(model, folder=tmp_path, formats=[format])
    assert THROUGH_4_BIT in result.notes
    assert f"Note: {THROUGH_4_BIT}." in (tmp_path / format / "README.md").read_text()
    manifest = read_manifest(tmp_path / format)
    assert manifest is not None
    assert manifest.through_4_bit
    assert manifest.bits["experts"] == 32
    export_model(load_model(result.base), folder=tmp_path / "next", formats=["nf4"], source=result.base)
    packed = read_manifest(tmp_path / "next" / "nf4")
    assert packed is not None
    assert not packed.through_4_bit  # it is in 4 bit, which `bits` says
    again = load_model(str(tmp_path / "next" / "nf4"))
    (last,) = export_model(again, folder=tmp_path / "last", formats=["ragged"], source=str(tmp_path / "next" / "nf4"))
    assert THROUGH_4_BIT in last.notes


def test_other_exports_say_nothing_of_4_bit(tmp_path):
    for result in export_model(cut_model(), folder=tmp_path, formats=["ragged", "nf4"]):
        assert THROUGH_4_BIT not in result.notes


def test_what_packing_adds_is_recorded(tmp_path):
    model = cut_model()
    peft_model = inject_adapters(model, config=AdapterConfig(expert_rank=2))
    shake(peft_model, scale=0.02)
    (result,) = export_model(model, folder=tmp_path, formats=["merged_nf4"], peft_model=peft_model)
    manifest = read_manifest(tmp_path / "merged_nf4")
    assert manifest is not None
    assert result.added_error is not None
    assert manifest.added_error == vars(result.added_error)
    assert result.added_error.describe() in (tmp_path / "merged_nf4" / "README.md").read_text()


def test_manifests_of_earlier_versions_are_read(tmp_path):
    export_model(cut_model(), folder=tmp_path, formats=["ragged"])
    file = tmp_path / "ragged" / MANIFEST_NAME
    content = json.loads(file.read_text())
    del content["through_4_bit"], content["added_error"]
    file.write_text(json.dumps(content))
    manifest = read_manifest(tmp_path / "ragged")
    assert manifest is not None
    assert (manifest.through_4_bit, manifest.added_error) == (False, None)
    for change, match in (
        ({"through_4_bit": 1}, "`through_4_bit` cannot be 1"),
        ({"added_error": {}}, "`added_error`"),
    ):
        file.write_text(json.dumps(content | change))
        with pytest.raises(ValueError, match=match):
            read_manifest(tmp_path / "ragged")
