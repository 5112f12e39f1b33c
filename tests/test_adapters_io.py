"""Inject, count, save, load, merge, and train with checkpointing, on whole tiny models."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from dora_reference import shake
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import FAMILY_NAMES, MODEL_NAMES, random_tokens, tiny_model
from transformers import PreTrainedModel

from lightning_moe.adapters import (
    AdapterConfig,
    DoraExperts,
    adapter_config_of,
    describe_trainable,
    inject_adapters,
    load_adapter,
    merge_adapters,
    save_adapter,
    trainable_groups,
)
from lightning_moe.models.channel_experts import ChannelExperts
from lightning_moe.models.discovery import moe_layers
from lightning_moe.models.families import FAMILIES
from lightning_moe.quantization.linears import quantize_model
from lightning_moe.surgery.cut import convert_experts, cut_layer

SMALL = AdapterConfig(expert_rank=2, router_rank=3, attention_rank=1, shared_expert_rank=5)


def _cut_model(
    name: str = "qwen3_moe", *, packed: bool = True, keep: float = 0.5, **overrides: object
) -> PreTrainedModel:
    """A tiny model with every third block of 8 channels gone, so that widths differ."""
    model = tiny_model(name, **overrides)
    for layer in moe_layers(model):
        keep_BC = torch.rand(8 * 4, generator=torch.Generator().manual_seed(layer.index)) < keep
        keep_BC[::4] = True
        cut_layer(layer, keep_C=keep_BC.repeat_interleave(8))
    if packed:
        quantize_model(model)
    return model


def _adapted_model(name: str = "qwen3_moe", *, config: AdapterConfig = SMALL, packed: bool = True) -> PeftModel:
    torch.manual_seed(0)
    peft_model = inject_adapters(_cut_model(name, packed=packed), config=config)
    shake(peft_model, scale=0.05)
    return peft_model.eval()


def _logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=random_tokens()).logits


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_injection_is_the_identity_and_every_adapter_gets_a_gradient(name: str, packed: bool) -> None:
    model = _cut_model(name, packed=packed)
    before = _logits(model)
    peft_model = inject_adapters(model, config=SMALL)
    torch.testing.assert_close(_logits(peft_model), before, rtol=1e-5, atol=1e-5)
    groups = trainable_groups(peft_model)
    has_shared = bool(moe_layers(model)[0].shared_names)
    assert set(groups) == {"experts", "router", "attention"} | ({"shared_experts"} if has_shared else set())
    peft_model(input_ids=random_tokens(), labels=random_tokens()).loss.backward()
    trainable = {id(parameter) for parameters in groups.values() for parameter in parameters}
    for parameter in peft_model.parameters():
        assert parameter.requires_grad == (id(parameter) in trainable)
        assert (parameter.grad is not None) == (id(parameter) in trainable)
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_save_load_merge_and_disable(name: str, tmp_path: Path) -> None:
    peft_model = _adapted_model(name)
    trained = _logits(peft_model)
    base = _logits(_cut_model(name))
    with peft_model.disable_adapter():
        assert torch.equal(_logits(peft_model), base)
    assert not torch.allclose(trained, base, atol=1e-3)
    save_adapter(peft_model, folder=tmp_path / "adapter")
    loaded = load_adapter(_cut_model(name), folder=tmp_path / "adapter")
    assert torch.equal(_logits(loaded), trained)
    merged = merge_adapters(loaded, dtype=torch.float32)
    torch.testing.assert_close(_logits(merged), trained, rtol=1e-5, atol=1e-5)


def test_stock_peft_loads_the_folder_with_our_config(tmp_path: Path) -> None:
    peft_model = _adapted_model("qwen2_moe")
    save_adapter(peft_model, folder=tmp_path / "adapter")
    assert sorted(file.name for file in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    model = _cut_model("qwen2_moe")
    config = adapter_config_of(tmp_path / "adapter", model=model)
    stock = PeftModel.from_pretrained(model, str(tmp_path / "adapter"), config=config)
    assert torch.equal(_logits(stock), _logits(peft_model))


def test_float16_file_is_half_the_size_and_loads_as_fp32(tmp_path: Path) -> None:
    config = AdapterConfig(expert_rank=16)
    peft_model = _adapted_model(config=config)
    save_adapter(peft_model, folder=tmp_path / "full")
    save_adapter(peft_model, folder=tmp_path / "half", dtype="float16")
    sizes = [(tmp_path / name / "adapter_model.safetensors").stat().st_size for name in ("full", "half")]
    assert 0.5 <= sizes[1] / sizes[0] < 0.52
    loaded = load_adapter(_cut_model(), folder=tmp_path / "half", trainable=True)
    full = load_file(tmp_path / "full" / "adapter_model.safetensors")
    for name, value in load_file(tmp_path / "half" / "adapter_model.safetensors").items():
        assert value.dtype == torch.float16
        torch.testing.assert_close(value.float(), full[name], rtol=2**-11, atol=1e-7)
    assert {p.dtype for group in trainable_groups(loaded).values() for p in group} == {torch.float32}
    torch.testing.assert_close(_logits(loaded), _logits(peft_model), rtol=1e-2, atol=1e-2)


def test_ranks_and_scalings_of_each_part() -> None:
    model = _adapted_model("qwen2_moe").get_base_model()
    layer = moe_layers(model)[0]
    assert layer.experts.r == {"default": 2}
    assert layer.router.r == {"default": 3}
    assert layer.router.lora_A_router["default"].shape == (3, 64)
    assert layer.block.shared_expert.up_proj.r == {"default": 5}
    assert layer.decoder_layer.self_attn.q_proj.r == {"default": 1}
    modules = (layer.experts, layer.router, layer.block.shared_expert.up_proj, layer.decoder_layer.self_attn.q_proj)
    assert [module.scaling["default"] for module in modules] == [2.0] * 4


def test_paper_ranks_router_rank_is_really_4_and_large_ranks_are_capped() -> None:
    model = inject_adapters(_cut_model(), config=AdapterConfig(expert_rank=100, router_rank=4)).get_base_model()
    assert moe_layers(model)[0].router.r == {"default": 4}
    assert moe_layers(model)[0].experts.r == {"default": 64}
    model = inject_adapters(_cut_model(), config=AdapterConfig(expert_rank=2, router_rank=99)).get_base_model()
    assert moe_layers(model)[0].router.r == {"default": 8}


def test_only_the_chosen_layers_are_adapted() -> None:
    peft_model = inject_adapters(
        _cut_model("deepseek"), config=AdapterConfig(expert_rank=2, attention_rank=1, layers=[1])
    )
    adapted = sorted({name.split(".")[4] for name, p in peft_model.named_parameters() if p.requires_grad})
    # MoE layer 1 is decoder layer 2: the first decoder layer is dense.
    assert adapted == ["2"]


def test_attention_of_latent_and_linear_kinds_is_adapted() -> None:
    for name, leaves in {
        "deepseek_v3": {"q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"},
        "qwen3_next": {"in_proj_qkvz", "in_proj_ba", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj"},
    }.items():
        config = AdapterConfig(expert_rank=0, router_rank=0, attention_rank=2)
        peft_model = inject_adapters(_cut_model(name), config=config)
        assert list(trainable_groups(peft_model)) == ["attention"]
        found = {
            key.split(".lora_")[0].rpartition(".")[2] for key, p in peft_model.named_parameters() if p.requires_grad
        }
        assert found == leaves


def test_attention_that_the_family_does_not_name_is_not_left_out_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    unnamed = replace(FAMILIES["qwen3_moe"], attention=("attention_of_another_name",))
    monkeypatch.setitem(FAMILIES, "qwen3_moe", unnamed)
    with pytest.raises(ValueError, match="`attention_rank` is set, but no attention Linear of this family was found"):
        inject_adapters(_cut_model(), config=AdapterConfig(expert_rank=2, attention_rank=1))


def test_norms_are_trained_saved_and_merged(tmp_path: Path) -> None:
    config = AdapterConfig(expert_rank=2, train_norms=True)
    peft_model = _adapted_model(config=config)
    groups = trainable_groups(peft_model, expected=("experts", "router", "norms"))
    # 2 layers of input, post-attention, q and k norms, and the final norm.
    assert len(groups["norms"]) == 9
    save_adapter(peft_model, folder=tmp_path / "adapter")
    loaded = load_adapter(_cut_model(), folder=tmp_path / "adapter")
    assert torch.equal(_logits(loaded), _logits(peft_model))
    merged = merge_adapters(loaded, dtype=torch.float32)
    torch.testing.assert_close(_logits(merged), _logits(peft_model), rtol=1e-5, atol=1e-5)


def test_description_counts_by_part() -> None:
    groups = trainable_groups(inject_adapters(_cut_model(), config=AdapterConfig(expert_rank=2, router_rank=4)))
    # Router of each of 2 layers: A 4 x 64, B 8 x 4, magnitude 8.
    assert sum(p.numel() for p in groups["router"]) == 2 * (4 * 64 + 8 * 4 + 8)
    lines = describe_trainable(groups).splitlines()
    assert [line.split()[0] for line in lines] == ["trainable", "experts", "router", "all"]
    assert lines[2].split()[1:] == ["6", "592"]
    total = sum(p.numel() for group in groups.values() for p in group)
    assert lines[3].split()[1:] == ["24", f"{total:,}"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_model_is_plain_and_can_be_packed_again(dtype: torch.dtype) -> None:
    merged = merge_adapters(_adapted_model("qwen2_moe", config=AdapterConfig(expert_rank=2, layers=[0])), dtype=dtype)
    assert not [name for name, module in merged.named_modules() if isinstance(module, Linear4bit | DoraExperts)]
    assert {parameter.dtype for parameter in merged.parameters()} == {dtype}
    assert all(isinstance(layer.experts, ChannelExperts) and not layer.experts.packed for layer in moe_layers(merged))
    assert not [name for name in merged.state_dict() if "lora" in name or "base_layer" in name]
    before = _logits(merged)
    quantize_model(merged)
    assert moe_layers(merged)[0].experts.packed
    assert (_logits(merged).float() - before.float()).norm() / before.float().norm() < 0.3


def test_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        peft_model = _adapted_model("qwen2_moe")
        if checkpointing:
            peft_model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        peft_model.train()
        peft_model(input_ids=random_tokens(), labels=random_tokens(), use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in peft_model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)


def test_one_training_step_lowers_the_loss() -> None:
    peft_model = inject_adapters(_cut_model(), config=AdapterConfig(expert_rank=4)).train()
    parameters = [p for group in trainable_groups(peft_model).values() for p in group]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(4):
        loss = peft_model(input_ids=random_tokens(), labels=random_tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"expert_rank": -1}, r"`expert_rank` must be 0 \(no adapter\) or a positive rank up to 65536, got -1"),
        ({"shared_expert_rank": -2}, r"`shared_expert_rank` must be 0 .* got -2"),
        ({"expert_rank": 0, "router_rank": 0}, r"Every adapter rank is 0"),
        ({"alpha_ratio": 0.0}, r"`alpha_ratio` .* must be positive, got 0.0"),
        ({"layers": []}, r"`layers` is empty"),
    ],
)
def test_config_errors(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdapterConfig(**values)


def test_injection_errors() -> None:
    with pytest.raises(ValueError, match=r"names MoE layers \[2, 7\], but this model has 2 \(0 to 1\)"):
        inject_adapters(_cut_model(), config=AdapterConfig(layers=[0, 2, 7]))
    with pytest.raises(ValueError, match=r"'model.layers.0.mlp.experts' has stock experts: call `convert_experts`"):
        inject_adapters(tiny_model(), config=AdapterConfig())


def test_asked_for_parts_must_be_trainable(tmp_path: Path) -> None:
    peft_model = _adapted_model(config=AdapterConfig(expert_rank=2))
    with pytest.raises(ValueError, match=r"Adapters for 'attention' were asked for, but no parameter"):
        trainable_groups(peft_model, expected=["experts", "attention"])
    with pytest.raises(
        ValueError, match=r"'gates' is not a part that can be trained. Allowed: experts, shared_experts"
    ):
        trainable_groups(peft_model, expected=["gates"])
    save_adapter(peft_model, folder=tmp_path / "adapter")
    frozen = load_adapter(_cut_model(), folder=tmp_path / "adapter")
    assert trainable_groups(frozen) == {}
    with pytest.raises(ValueError, match=r"Adapters for 'experts' were asked for"):
        trainable_groups(frozen, expected=["experts"])


def test_save_errors_leave_nothing_behind(tmp_path: Path) -> None:
    peft_model = _adapted_model(config=AdapterConfig(expert_rank=2))
    with pytest.raises(ValueError, match=r"stored as 'float32' or 'float16', got 'int8'"):
        save_adapter(peft_model, folder=tmp_path / "adapter", dtype="int8")  # pyright: ignore
    trainable_groups(peft_model)["router"][0].data[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"mlp.gate.lora_A_router' has values that are not finite in float16"):
        save_adapter(peft_model, folder=tmp_path / "adapter", dtype="float16")
    with pytest.raises(ValueError, match=r"float32, bfloat16 or float16, got torch.uint8"):
        merge_adapters(peft_model, dtype=torch.uint8)
    assert list(tmp_path.iterdir()) == []


def test_load_errors(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    with pytest.raises(ValueError, match=r"There is no adapter at"):
        load_adapter(_cut_model(), folder=folder)
    save_adapter(_adapted_model(config=AdapterConfig(expert_rank=2)), folder=folder)
    model = _cut_model(keep=0.9)
    before = _logits(model)
    with pytest.raises(ValueError, match=r"made for another model: '.*layers.0.*lora_A_down' has shape"):
        load_adapter(model, folder=folder)
    assert torch.equal(_logits(model), before)
    assert not [name for name in model.state_dict() if "lora" in name]
    with pytest.raises(ValueError, match=r"'.*layers.1.*' is missing in the file|has shape|no such tensor"):
        load_adapter(_cut_model(num_hidden_layers=1), folder=folder)


def test_load_names_missing_files_and_foreign_configs(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    save_adapter(_adapted_model(config=AdapterConfig(expert_rank=2)), folder=folder)
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    weights = damaged / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"is not a readable adapter"):
        load_adapter(_cut_model(), folder=damaged)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({"peft_type": "IA3"}))
    with pytest.raises(ValueError, match=r"is not the config of a LoRA or DoRA adapter"):
        load_adapter(_cut_model(), folder=folder)
    config.unlink()
    with pytest.raises(ValueError, match=r"There is no adapter config at"):
        load_adapter(_cut_model(), folder=folder)


def test_a_file_with_a_tensor_too_many_or_too_few_is_named(tmp_path: Path) -> None:
    wide, narrow = tmp_path / "wide", tmp_path / "narrow"
    save_adapter(_adapted_model(config=AdapterConfig(expert_rank=2)), folder=wide)
    save_adapter(_adapted_model(config=AdapterConfig(expert_rank=2, router_rank=0)), folder=narrow)
    shutil.copy(wide / "adapter_config.json", narrow)
    with pytest.raises(ValueError, match=r"mlp.gate.lora_A_router' is missing in the file"):
        load_adapter(_cut_model(), folder=narrow)
    save_adapter(_adapted_model(config=AdapterConfig(expert_rank=2, router_rank=0)), folder=narrow)
    shutil.copy(narrow / "adapter_config.json", wide)
    with pytest.raises(ValueError, match=r"mlp.gate.lora_A_router' is in the file, but the model has no such tensor"):
        load_adapter(_cut_model(), folder=wide)


def test_stock_experts_stay_untouched_when_only_attention_is_adapted() -> None:
    model = tiny_model()
    peft_model = inject_adapters(model, config=AdapterConfig(expert_rank=0, router_rank=0, attention_rank=2))
    assert list(trainable_groups(peft_model)) == ["attention"]
    convert_experts(model)
    assert peft_model(input_ids=random_tokens()).logits.isfinite().all()
