"""Novices: a cut whose evicted experts leave their mean output behind equals the model with that output put in."""

import json

import pytest
import torch
from layer_reference import RealLayer
from tiny_models import HIDDEN_SIZE, NUM_EXPERTS, WIDTH, random_tokens, tiny_model
from torch import Tensor
from torch.nn import functional

from lightning_moe.adapters.inject import AdapterConfig, inject_adapters
from lightning_moe.adapters.merge import merge_adapters
from lightning_moe.calibration.collector import collect_statistics
from lightning_moe.export.huggingface import save_ragged
from lightning_moe.export.padded import export_padded
from lightning_moe.models.discovery import model_shape, moe_layers
from lightning_moe.models.loading import load_model
from lightning_moe.quantization.footprint import measure_footprint
from lightning_moe.quantization.linears import quantize_model
from lightning_moe.records import PrunePlan
from lightning_moe.surgery.cut import apply_plan
from lightning_moe.surgery.novices import mean_outputs
from lightning_moe.surgery.structure import apply_structure, structure_of

# With and without normalised weights, sigmoid scores, biases, groups, a multiplied residual.
NAMES = (
    "qwen3_moe",
    "olmoe",
    "granitemoe",
    "ernie4_5_moe",
    "deepseek_v2_grouped",
    "deepseek_v3",
    "deepseek_v3_grouped",
)
EVICTED = ((1, 4), (6,))
LOADERS = {"text": [{"input_ids": random_tokens(batch=4, length=24, seed=seed)} for seed in range(2)]}
IDS = random_tokens(batch=2, length=24, seed=7)


def make(name: str = "qwen3_moe", **overrides):
    groups = {"n_group": 2, "topk_group": 2} if name.endswith("grouped") else {}
    return tiny_model(name, **(groups | overrides))


def eviction(model, *, evicted=EVICTED) -> PrunePlan:
    """The other experts keep all channels."""
    shape = model_shape(model)
    keep = []
    for layer, gone in zip(shape.layers, evicted, strict=True):
        expert_C = torch.arange(layer.num_experts).repeat_interleave(torch.tensor(layer.widths))
        keep.append(~torch.isin(expert_C, torch.tensor(gone)))
    return PrunePlan(shape=shape, method="test", prune_ratio=0.2, align=1, keep=tuple(keep), provenance={})


def with_novices(name: str = "qwen3_moe"):
    model = make(name)
    plan = eviction(model)
    novices = mean_outputs(collect_statistics(model, loaders=LOADERS, progress=False), plan=plan)
    apply_plan(model, plan=plan, novices=novices)
    return model


def reference(name: str = "qwen3_moe"):
    """The stock model, expert by expert, with the mean output of each evicted one, taken from its activations."""
    model = make(name)
    inputs = {"input_ids": torch.cat([batch["input_ids"] for batch in LOADERS["text"]])}
    for index, layer in enumerate(moe_layers(model)):
        routed = RealLayer(model, inputs, layer_index=index).routed()
        # Layers are calibrated on the whole model, so this one's replacement waits until all means are known.
        layer.block.means = {expert: routed[expert].z_SH.detach().mean(0) for expert in EVICTED[index]}
    for layer in moe_layers(model):
        layer.experts.forward = replaced(layer.experts, constants=layer.block.means)
    return model


def replaced(experts, *, constants: dict[int, Tensor]):
    def forward(hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        total_TH = torch.zeros_like(hidden_TH)
        for expert in range(NUM_EXPERTS):
            token_S, slot_S = torch.where(index_TK == expert)
            a_Sn, u_Sn = functional.linear(hidden_TH[token_S], experts.gate_up_proj[expert]).chunk(2, dim=-1)
            z_SH = functional.linear(experts.act_fn(a_Sn) * u_Sn, experts.down_proj[expert])
            if expert in constants:
                z_SH = constants[expert].expand_as(z_SH)
            total_TH = total_TH.index_add(0, token_S, z_SH * weights_TK[token_S, slot_S, None].to(z_SH.dtype))
        return total_TH

    return forward


def logits(model, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("name", NAMES)
def test_a_cut_with_novices_equals_the_model_with_mean_outputs(name):
    cut, expected = with_novices(name), reference(name)
    layers = moe_layers(cut)
    assert [layer.experts.novice_experts for layer in layers] == list(EVICTED)
    assert [layer.experts.num_experts for layer in layers] == [NUM_EXPERTS] * 2
    found, wanted = logits(cut), logits(expected)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    # The replacement is visible: some of these tokens go to the evicted experts.
    assert float((logits(make(name)) - wanted).abs().max()) > 50 * float((found - wanted).abs().max())


def test_gradients_reach_the_router_through_novices():
    cut, expected = with_novices(), reference()
    grads = []
    for model in (cut, expected):
        output = model(input_ids=IDS, labels=IDS, use_cache=False)
        output.loss.backward()
        grads.append([layer.router.weight.grad for layer in moe_layers(model)])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-6)
    assert all(not layer.experts.novices.requires_grad for layer in moe_layers(cut))


def test_channels_go_and_experts_leave_constants_in_one_cut():
    model, expected = make(), reference()
    keep = [keep_C & (torch.arange(len(keep_C)) % WIDTH < 8) for keep_C in eviction(model).keep]
    plan = PrunePlan(shape=model_shape(model), method="test", prune_ratio=0.8, align=1, keep=tuple(keep), provenance={})
    novices = mean_outputs(collect_statistics(model, loaders=LOADERS, progress=False), plan=plan)
    apply_plan(model, plan=plan, novices=novices)
    for layer in moe_layers(expected):
        layer.experts.down_proj.data[:, :, 8:] = 0
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-4, atol=1e-4)


def test_an_expert_without_tokens_leaves_zeros():
    model = make("deepseek_v3")
    for layer in moe_layers(model):
        layer.router.e_score_correction_bias.data[1] = -10.0  # never chosen
    statistics = collect_statistics(model, loaders=LOADERS, progress=False)
    rows = mean_outputs(statistics, plan=eviction(model, evicted=((1,), (1, 2)))).rows
    assert torch.equal(rows[0], torch.zeros(1, HIDDEN_SIZE, dtype=torch.float64))
    assert torch.equal(rows[1][0], rows[0][0])
    assert float(rows[1][1].abs().max()) > 0


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v2_grouped"])
def test_calibration_of_a_model_with_novices_counts_their_output(name):
    cut = with_novices(name)
    sums = collect_statistics(cut, loaders={"text": [{"input_ids": IDS}]}, progress=False).total()[0]
    experts = moe_layers(cut)[0].experts
    for row, expert in enumerate(experts.novice_experts):
        count = sums["count"][expert]
        expected_H = experts.novices[row].double() * count
        torch.testing.assert_close(sums["output_sum"][expert], expected_H, rtol=1e-4, atol=1e-6)
    output = {}
    for layer in moe_layers(cut)[1:]:
        layer.experts.register_forward_pre_hook(lambda _, args: output.update(x=args[0]))
    logits(cut)
    plain = output["x"]
    collect_statistics(cut, loaders={"text": [{"input_ids": IDS}]}, progress=False)
    torch.testing.assert_close(output["x"], plain, rtol=1e-4, atol=1e-5)


def test_a_second_cut_keeps_the_novices_there_are_and_adds_new_ones():
    model = with_novices()
    first_NH = moe_layers(model)[0].experts.novices.detach().clone()
    before = logits(model)
    plan = eviction(model, evicted=((), ()))
    apply_plan(model, plan=plan)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    plan = eviction(model, evicted=((0,), (0,)))
    apply_plan(model, plan=plan)  # without a novice of its own, expert 0 leaves the router
    experts = moe_layers(model)[0].experts
    assert (experts.num_experts, experts.novice_experts) == (NUM_EXPERTS - 1, (0, 3))
    assert torch.equal(experts.novices, first_NH)
    plan = eviction(model, evicted=((1,), (1,)))
    novices = mean_outputs(collect_statistics(model, loaders=LOADERS, progress=False), plan=plan)
    apply_plan(model, plan=plan, novices=novices)
    experts = moe_layers(model)[0].experts
    assert experts.novice_experts == (0, 1, 3)
    torch.testing.assert_close(experts.novices[1].double(), novices.rows[0][0], rtol=1e-5, atol=1e-7)
    assert torch.equal(experts.novices[[0, 2]], first_NH)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v2_grouped", "deepseek_v3_grouped"])
def test_saving_and_loading_keeps_them(name, packed, tmp_path):
    model = with_novices(name)
    if packed:
        quantize_model(model)
        assert moe_layers(model)[0].experts.novices.dtype == torch.float32  # never in 4 bit
    save_ragged(model, tmp_path / "model")
    reloaded = load_model(str(tmp_path / "model"))
    assert moe_layers(reloaded)[0].experts.novice_experts == EVICTED[0]
    torch.testing.assert_close(logits(reloaded), logits(model), rtol=1e-5, atol=1e-5)
    written = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    assert list(written["novices"].values()) == [list(gone) for gone in EVICTED]
    save_ragged(reloaded, tmp_path / "half", dtype=torch.bfloat16)
    assert moe_layers(load_model(str(tmp_path / "half")))[0].experts.novices.dtype == torch.bfloat16
    # It is a source like any other now, also for checkpoints of a training.
    apply_structure(load_model(str(tmp_path / "model")), structure=structure_of(reloaded))


def test_a_folder_whose_novices_do_not_fit_is_refused(tmp_path):
    save_ragged(with_novices(), tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    content = json.loads(config.read_text())
    for novices, message in (
        ({}, "each of width >= 1 or a novice"),
        ({"model.layers.0.mlp.experts": [0, 1, 4]}, r"must be experts of width 0, ascending, of \[1, 4\], got \[0, 1"),
        ({"model.layers.9.mlp.experts": [1]}, "for other experts modules than the model has"),
        ({"model.layers.0.mlp.experts": "no"}, "`novices` of .* must be a list of integers"),
        ([1], "`novices` in config.json must map names"),
    ):
        content["quantization_config"]["novices"] = novices
        config.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            load_model(str(tmp_path / "model"))


def test_adapters_train_beside_novices_and_merge():
    model = with_novices()
    plain = logits(model)
    peft_model = inject_adapters(model, config=AdapterConfig(expert_rank=2, router_rank=2))
    torch.testing.assert_close(logits(model), plain, rtol=1e-4, atol=1e-4)
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if "lora_B_router" in name]
    assert len(gradients) == 2
    assert all(float(gradient.abs().max()) > 0 for gradient in gradients)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    adapted = logits(model.eval())  # a change of mode, so that the norms follow
    assert float((adapted - plain).abs().max()) > 1e-2
    merged = merge_adapters(peft_model, dtype=torch.float32)
    assert moe_layers(merged)[0].experts.novice_experts == EVICTED[0]
    torch.testing.assert_close(logits(merged), adapted, rtol=1e-3, atol=1e-3)


def test_the_footprint_counts_a_constant_as_a_row():
    model, dropped = with_novices(), make()
    apply_plan(dropped, plan=eviction(dropped))
    with_them, without = measure_footprint(model), measure_footprint(dropped)
    router_rows = novices = 3 * HIDDEN_SIZE
    assert with_them.stored_params - without.stored_params == router_rows + novices
    usage = {layer.name: torch.full((NUM_EXPERTS,), 2 / NUM_EXPERTS) for layer in moe_layers(model)}
    measured = measure_footprint(model, usage=usage)
    assert measured.active_params == pytest.approx(with_them.active_params)
    always = with_them.stored_params - novices - 13 * 3 * HIDDEN_SIZE * WIDTH
    assert measured.active_params == pytest.approx(always + (novices + 13 * 3 * HIDDEN_SIZE * WIDTH) / 4)


def test_what_cannot_hold_novices_says_so(tmp_path):
    model, dropped = with_novices(), make()
    apply_plan(dropped, plan=eviction(dropped))
    with pytest.raises(ValueError, match="has 2 novices, constants that a stock checkpoint has no place for"):
        export_padded(model, tmp_path / "padded")
    with pytest.raises(ValueError, match="has novices, which cannot be made again from its source"):
        structure_of(model)
    with pytest.raises(ValueError, match="has novices, which cannot be made again from its source"):
        apply_structure(model, structure=structure_of(dropped))


def test_novices_of_another_plan_or_from_other_statistics_are_refused():
    model = make()
    plan, other = eviction(model), eviction(model, evicted=((2,), (3,)))
    statistics = collect_statistics(model, loaders=LOADERS, progress=False)
    novices = mean_outputs(statistics, plan=plan)
    with pytest.raises(ValueError, match=rf"made for plan {plan.digest[:12]}, got plan {other.digest[:12]}"):
        apply_plan(model, plan=other, novices=novices)
    lean = collect_statistics(model, loaders=LOADERS, moments=False, progress=False)
    with pytest.raises(ValueError, match=r"need the statistic `output_sum`.*`moments`"):
        mean_outputs(lean, plan=plan)
    with pytest.raises(ValueError, match="statistics are of another model than the plan's"):
        mean_outputs(statistics, plan=eviction(make(seed=1)))
