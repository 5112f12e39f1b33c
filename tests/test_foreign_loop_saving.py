"""A plain `save_pretrained` of a model that was cut in memory, as every loop that is not ours calls it."""

import copy
import json

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from random_plans import random_plan
from tiny_models import random_tokens, tiny_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

from lightning_moe.adapters.inject import AdapterConfig, inject_adapters
from lightning_moe.models.channel_experts import ChannelExperts
from lightning_moe.models.discovery import expert_widths, moe_layers
from lightning_moe.models.loading import load_model
from lightning_moe.quantization.linears import quantize_model
from lightning_moe.surgery.cut import apply_plan, convert_experts

pytestmark = [pytest.mark.foreign_loop, pytest.mark.filterwarnings("ignore:.*`fast`.*")]


def cut_model(name="qwen3_moe", *, evicted=((1,),), **overrides):
    model = tiny_model(name, **overrides)
    apply_plan(model, plan=random_plan(model, evicted=evicted))
    return model


def widths(model):
    return [expert_widths(layer.experts) for layer in moe_layers(model)]


@torch.no_grad()
def logits(model):
    return model(input_ids=random_tokens()).logits


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen2_moe", "mixtral", "deepseek_v3", "deepseek_v3_grouped", "olmoe"])
def test_what_it_writes_loads_again_with_the_same_logits(tmp_path, name):
    groups = {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 2} if name.endswith("grouped") else {}
    model = cut_model(name, evicted=((1, 2),), **groups)
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert widths(reloaded) == widths(model)
    assert sum(map(sum, widths(reloaded))) < len(widths(model)) * 8 * 32
    assert torch.equal(logits(reloaded), logits(model))


def test_the_config_says_the_widths_of_the_last_cut(tmp_path):
    model = cut_model()
    model.save_pretrained(tmp_path)
    apply_plan(model, plan=random_plan(model, seed=1))
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["widths"]
    assert [tuple(values) for values in written.values()] == widths(model)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_shards_and_safe_copies_work_too(tmp_path):
    model = copy.deepcopy(cut_model())
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_a_model_prepared_for_cuts_is_saved_whole(tmp_path):
    model = tiny_model()
    expected = logits(model)
    convert_experts(model)
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert widths(reloaded) == [(32,) * 8] * 2
    assert torch.allclose(logits(reloaded), expected, atol=1e-5)


def test_a_packed_model_is_saved_packed(tmp_path):
    model = cut_model()
    quantize_model(model)
    model.save_pretrained(tmp_path)
    reloaded = load_model(str(tmp_path))
    assert all(layer.experts.packed for layer in moe_layers(reloaded))
    assert torch.equal(logits(reloaded), logits(model))


def test_a_model_that_bitsandbytes_packed_while_loading_keeps_its_4_bit_layers(tmp_path):
    tiny_model().save_pretrained(tmp_path / "stock")
    packing = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", quantization_config=packing)
    apply_plan(model, plan=random_plan(model))
    model.save_pretrained(tmp_path / "cut")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    assert widths(reloaded) == widths(model)
    assert isinstance(reloaded.model.layers[0].self_attn.q_proj, Linear4bit)
    expected = model.state_dict()
    assert reloaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in reloaded.state_dict().items())


def test_an_uncut_model_is_saved_in_its_stock_layout(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_adapters_inside_are_refused_and_the_way_out_is_named(tmp_path):
    model = cut_model()
    inject_adapters(model, config=AdapterConfig(expert_rank=2, router_rank=2))
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.mlp\.experts' has adapters, .* Export the model with"):
        model.save_pretrained(tmp_path)


def test_a_reloaded_16_bit_model_is_trained_whole_by_a_transformers_trainer(tmp_path):
    """Its config carries a `quantization_config`, and the Trainer refuses to train quantized models."""
    cut_model().save_pretrained(tmp_path / "cut")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    before = moe_layers(model)[0].experts.gate_proj.weight.detach().clone()
    row = random_tokens(batch=1)[0]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no"
    )
    Trainer(model=model, args=arguments, train_dataset=[{"input_ids": row, "labels": row}] * 8).train()
    after = moe_layers(model)[0].experts
    assert isinstance(after, ChannelExperts)
    assert not torch.equal(after.gate_proj.weight, before)


def test_a_reloaded_packed_model_still_counts_as_quantized(tmp_path):
    model = cut_model()
    quantize_model(model)
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert reloaded.is_quantized
    with pytest.raises(ValueError, match="cannot perform fine-tuning on purely quantized models"):
        Trainer(model=reloaded, args=TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True))
