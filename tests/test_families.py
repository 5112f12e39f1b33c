"""Every supported family, on tiny random models: discovery, cuts, storage, gradients."""

# T tokens, K experts per token, E experts

from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import CASES, EVICTED, Case
from random_plans import random_plan
from reference_moe import ROUTER_RULES, mask_stock_model
from tiny_models import MODEL_NAMES, NUM_EXPERTS, TOP_K, WIDTH, random_tokens, tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lightning_moe.export.huggingface import save_ragged
from lightning_moe.models.channel_experts import ChannelExperts
from lightning_moe.models.discovery import find_language_model, is_grouped, model_shape, moe_layers
from lightning_moe.models.families import FAMILIES, family_of
from lightning_moe.quantization.nf4 import PackedRows
from lightning_moe.surgery.cut import apply_plan, convert_experts


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    return model(input_ids=random_tokens(), use_cache=False).logits


def reload(model: PreTrainedModel, folder: Path, **kwargs: Any) -> PreTrainedModel:
    save_ragged(model, folder)
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_every_family_is_tested() -> None:
    assert {tiny_model(name).config.model_type for name in MODEL_NAMES} == set(FAMILIES)
    assert set(ROUTER_RULES) == set(MODEL_NAMES)


def test_shape_is_discovered(case) -> None:
    model = case.model()
    shape, layers = model_shape(model), moe_layers(model)
    assert shape.model_type == FAMILIES[model.config.model_type].model_type
    assert shape.hidden_size == model.config.hidden_size
    assert len(shape.layers) == 2
    for record, layer in zip(shape.layers, layers, strict=True):
        assert record.widths == (WIDTH,) * NUM_EXPERTS
        assert record.top_k == TOP_K
        assert (record.num_groups, record.top_k_groups) == ((2, 1) if case.overrides else (1, 1))
        assert model.get_submodule(record.name) is layer.experts
        assert model.get_submodule(layer.router_name) is layer.router
        assert all(isinstance(model.get_submodule(name), nn.Module) for name in layer.shared_names)
        assert len(layer.shared_names) == len(layer.family.shared_experts)
    assert model_shape(case.model()) == shape
    assert model_shape(case.model(seed=1)).router_digest != shape.router_digest


def test_config_fields_of_experts_are_declared(case) -> None:
    model = case.model()
    family = family_of(model.config)
    assert getattr(model.config, family.expert_width) == WIDTH
    assert getattr(model.config, family.expert_count) == NUM_EXPERTS


def test_converted_equals_stock(case) -> None:
    model = case.model()
    expected, shape = logits_of(model), model_shape(model)
    convert_experts(model)
    assert all(isinstance(layer.experts, ChannelExperts) for layer in moe_layers(model))
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-5, atol=1e-6)
    assert model_shape(model) == shape


def test_reference_routers_equal_the_stock_ones(case) -> None:
    expected = logits_of(case.model())
    reference = mask_stock_model(case.model(), rule=ROUTER_RULES[case.name], plan=None)
    torch.testing.assert_close(logits_of(reference), expected, rtol=1e-4, atol=1e-5)


def test_cut_equals_the_masked_stock_model(case) -> None:
    model = case.model()
    plan = random_plan(model, evicted=EVICTED)
    reference = mask_stock_model(case.model(), rule=ROUTER_RULES[case.name], plan=plan)
    apply_plan(model, plan=plan)
    assert (logits_of(model) - logits_of(case.model())).abs().max() > 1e-3
    torch.testing.assert_close(logits_of(model), logits_of(reference), rtol=1e-4, atol=1e-5)
    for layer, evicted in zip(moe_layers(model), EVICTED, strict=True):
        kept = tuple(width for width in plan.widths(layer.index) if width or is_grouped(layer))
        assert layer.experts.widths == kept
        assert len(kept) == NUM_EXPERTS - (0 if is_grouped(layer) else len(evicted))


def test_evicted_experts_are_never_chosen(case) -> None:
    model = case.cut_model()
    chosen: dict[int, set[int]] = {}
    for layer in moe_layers(model):
        layer.experts.register_forward_pre_hook(
            lambda _, args, i=layer.index: chosen.setdefault(i, set()).update(args[1].flatten().tolist())
        )
    logits_of(model)
    for layer in moe_layers(model):
        alive = {e for e, width in enumerate(layer.experts.widths) if width}
        assert chosen[layer.index] <= alive
        assert len(alive) == NUM_EXPERTS - len(EVICTED[layer.index])


def test_a_cut_model_is_cut_again(case) -> None:
    model = case.cut_model()
    second = random_plan(model, evicted=((0,), ()), seed=5)
    before = [layer.experts for layer in moe_layers(model)]
    masked = case.cut_model()
    for layer in moe_layers(masked):
        weight = layer.experts.down_proj.weight
        keep_C = torch.empty(len(weight), dtype=torch.bool)
        keep_C[layer.experts.storage_order()] = second.keep[layer.index]
        weight.data *= keep_C.unsqueeze(1)
    apply_plan(model, plan=second)
    assert [layer.experts for layer in moe_layers(model)] != before
    assert model_shape(model).num_channels == second.num_kept
    if is_grouped(moe_layers(model)[0]):
        assert moe_layers(model)[0].experts.widths[:2] == (0, 0)
        return
    first_layer = moe_layers(masked)[0]
    rule = ROUTER_RULES[case.name]
    routed = lambda hidden: rule.route(first_layer.router, hidden, evicted=[0], top_k=TOP_K)  # noqa: E731
    first_layer.router.forward = routed
    torch.testing.assert_close(logits_of(model), logits_of(masked), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "nf4"])
def test_saved_and_reloaded_is_the_same_model(case, packed, tmp_path) -> None:
    model = case.cut_model(packed=packed)
    expected = logits_of(model)
    loaded = reload(model, tmp_path / "first")
    assert torch.equal(logits_of(loaded), expected)
    assert model_shape(loaded) == model_shape(model)
    save_ragged(loaded, tmp_path / "second")
    assert bytes_of(tmp_path / "first") == bytes_of(tmp_path / "second")
    loaded.save_pretrained(tmp_path / "third")
    assert bytes_of(tmp_path / "first") == bytes_of(tmp_path / "third")


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "nf4"])
def test_generate_uses_the_cache(case, packed, tmp_path) -> None:
    loaded = reload(case.cut_model(packed=packed), tmp_path / "model")
    prompt = random_tokens(batch=1, length=5)
    options = {"max_new_tokens": 4, "do_sample": False, "min_new_tokens": 4}
    cached = loaded.generate(prompt, attention_mask=torch.ones_like(prompt), use_cache=True, **options)
    plain = loaded.generate(prompt, attention_mask=torch.ones_like(prompt), use_cache=False, **options)
    assert cached.shape == (1, 9)
    assert torch.equal(cached, plain)


def test_a_requested_type_leaves_packed_weights_alone(case, tmp_path) -> None:
    model = case.cut_model(packed=True)
    loaded = reload(model, tmp_path / "model", dtype=torch.bfloat16)
    for mine, other in zip(moe_layers(model), moe_layers(loaded), strict=True):
        for (name, expected), (_, value) in zip(
            mine.experts.state_dict().items(), other.experts.state_dict().items(), strict=True
        ):
            assert value.dtype == expected.dtype, name
            assert torch.equal(value, expected), name
    assert loaded.get_input_embeddings().weight.dtype == torch.bfloat16
    assert {module.scale.dtype for module in loaded.modules() if isinstance(module, PackedRows)} == {torch.float32}
    assert (logits_of(loaded).float() - logits_of(model)).abs().max() < 0.2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_unpacked_tensors_get_the_requested_type(case, dtype, tmp_path) -> None:
    save_ragged(case.cut_model(), tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=dtype)
    stock = case.model()
    stock.save_pretrained(tmp_path / "stock")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", dtype=dtype)
    expected = {name: value.dtype for name, value in stock.state_dict().items() if ".experts." not in name}
    found = {name: value.dtype for name, value in loaded.state_dict().items() if name in expected}
    assert found == expected
    assert {layer.experts.gate_proj.weight.dtype for layer in moe_layers(loaded)} == {dtype}
    assert logits_of(loaded).isfinite().all()


def test_gradients_reach_every_trainable_parameter(case) -> None:
    model = case.cut_model().train()
    ids = random_tokens(batch=4, length=24)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
    for layer in moe_layers(model):
        assert all(parameter.grad.abs().max() > 0 for parameter in layer.experts.parameters())
        assert layer.router.weight.grad.abs().max() > 0


def test_gradients_pass_through_packed_experts(case) -> None:
    model = case.cut_model(packed=True).train()
    embeddings = model.get_input_embeddings()(random_tokens()).detach().requires_grad_()
    model(inputs_embeds=embeddings, use_cache=False).logits.square().sum().backward()
    assert embeddings.grad is not None
    assert embeddings.grad.isfinite().all()
    assert embeddings.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_unknown_model_type_lists_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"'llama' is not a known Mixture-of-Experts family. Supported: deepseek, .*qwen3"
    ):
        family_of(CONFIG_MAPPING["llama"]())


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("gpt_oss", "bias terms"),
        ("aria_text", "transposed"),
        ("nemotron_h", "no gate projection"),
        ("llama4_text", "signature"),
        ("dbrx", "signature"),
    ],
)
def test_refused_families_say_why(model_type, reason) -> None:
    config = PretrainedConfig()
    config.model_type = model_type
    with pytest.raises(ValueError, match=f"'{model_type}' is not supported: .*{reason}.* Supported: deepseek"):
        family_of(config)


def test_a_model_without_moe_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="'qwen3_moe' model has no MoE layer: every layer of its config is dense"):
        model_shape(_all_dense())


def _all_dense() -> PreTrainedModel:
    config = tiny_model("qwen3_moe").config
    config.mlp_only_layers = [0, 1]
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(("option", "value"), [("norm_topk_prob", True), ("topk_method", "group_limited_greedy")])
def test_deepseek_refuses_routing_it_does_not_do(option, value) -> None:
    with pytest.raises(ValueError, match=f"`{option}` must be .* for model type 'deepseek'"):
        tiny_model("deepseek", **{option: value})


class Wrapper(nn.Module):
    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({str(number): model for number, model in enumerate(models)})


def test_the_language_model_is_found_inside_a_module() -> None:
    model = tiny_model()
    assert find_language_model(Wrapper(nn.Linear(2, 2), model)) is model
    assert find_language_model(model) is model


@pytest.mark.parametrize("count", [0, 2])
def test_none_or_two_language_models_are_refused(count) -> None:
    wrapper = Wrapper(*[tiny_model() for _ in range(count)])
    with pytest.raises(ValueError, match=f"Expected exactly one transformers model inside Wrapper, found {count}"):
        find_language_model(wrapper)


def test_a_plan_for_another_model_is_refused() -> None:
    plan = random_plan(tiny_model(seed=1))
    with pytest.raises(ValueError, match="The plan was made for another model: router_digest"):
        apply_plan(tiny_model(), plan=plan)
