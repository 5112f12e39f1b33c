"""The collector: what counts, what adds up, what it leaves behind, and what it refuses."""

from functools import partial

import pytest
import torch
from tiny_models import FAMILY_NAMES, MODEL_NAMES, NUM_EXPERTS, WIDTH, random_tokens, tiny_model
from torch import Tensor

from lightning_moe.calibration.collector import CalibrationCollector, collect_statistics
from lightning_moe.calibration.measure import CountedTokens, LayerMeasurement, OutputBuffer, router_sums, weight_norms
from lightning_moe.models.channel_experts import ChannelExperts
from lightning_moe.models.discovery import expert_matrices, moe_layers
from lightning_moe.quantization.nf4 import pack_experts, unpack_experts
from lightning_moe.records import STATISTICS, CalibrationStatistics, PrunePlan
from lightning_moe.surgery.cut import apply_plan, convert_experts
from scripts.benchmarking import peak_bytes

MOMENTS = {"output_sum", "output_sq", "input_sq", "output_gram"}
GRADIENTS = {"loss_snip", "loss_taylor"}  # of another pass


def collect(model, *batches: Tensor, mask: Tensor | None = None, moments: bool = True) -> CalibrationStatistics:
    extra = {} if mask is None else {"attention_mask": mask}
    loader = [{"input_ids": ids, **extra} for ids in batches]
    return collect_statistics(model, loaders={"text": loader}, moments=moments, progress=False)


def assert_same(one: CalibrationStatistics, other: CalibrationStatistics, *, rtol: float, atol: float = 0.0) -> None:
    for mine, theirs in zip(one.total(), other.total(), strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            named = partial("{}: {}".format, name)
            torch.testing.assert_close(value, theirs[name], rtol=rtol, atol=atol + 1e-9, msg=named)


def prune_half(model) -> None:
    """Keeps the first half of every second expert's channels."""
    shape = collect(model, random_tokens()).shape
    keep_C = (torch.arange(NUM_EXPERTS * WIDTH) % WIDTH < WIDTH // 2) | (
        torch.arange(NUM_EXPERTS * WIDTH) // WIDTH % 2 == 0
    )
    plan = PrunePlan(
        shape=shape, method="test", prune_ratio=0.25, align=1, keep=(keep_C,) * len(shape.layers), provenance={}
    )
    apply_plan(model, plan=plan)


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_the_output_is_that_of_the_plain_forward_and_every_statistic_is_there(name):
    model, ids = tiny_model(name), random_tokens(length=20)
    mask = torch.ones_like(ids)
    mask[0, 13:] = 0
    with torch.no_grad():
        plain = model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    with CalibrationCollector(model) as collector, collector.batch(corpus="text", attention_mask=mask):
        ours = model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    for sums in collector.statistics().total():
        assert sums.keys() == STATISTICS.keys() - GRADIENTS
        assert float(sums["num_tokens"]) == 33


def test_bfloat16_sums_agree_with_float32():
    ids = random_tokens(length=64)
    exact, rough = (collect(tiny_model(dtype=dtype), ids).total()[0] for dtype in (torch.float32, torch.bfloat16))
    for name in ("layer_energy", "gate_weight", "norm", "hidden_sq", "channel_saliency", "router_probability"):
        assert float(rough[name].sum()) == pytest.approx(float(exact[name].sum()), rel=0.05), name


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_padding_never_counts(name):
    model, ids = tiny_model(name), random_tokens(batch=2, length=12)
    padded = torch.cat([ids, torch.zeros_like(ids)[:, :5]], dim=1)
    mask = (torch.arange(17) < 12).long().expand(2, -1)
    assert_same(collect(model, padded, mask=mask), collect(model, ids), rtol=2e-4, atol=1e-6)


def test_two_half_batches_are_one_and_their_order_does_not_matter():
    model, ids = tiny_model(), random_tokens(batch=4, length=16)
    whole, halves, turned = collect(model, ids), collect(model, ids[:2], ids[2:]), collect(model, ids[2:], ids[:2])
    assert_same(whole, halves, rtol=1e-4, atol=1e-6)
    assert_same(halves, turned, rtol=1e-13)


def test_batches_of_unequal_size_add_up():
    model, ids = tiny_model(), random_tokens(batch=4, length=16)
    assert_same(collect(model, ids), collect(model, ids[:3], ids[3:]), rtol=1e-4, atol=1e-6)


def test_corpora_are_kept_apart_and_merge_to_the_same_sums():
    model, ids = tiny_model("glm4_moe"), random_tokens(batch=4)
    first, second = [{"input_ids": ids[:2]}], [{"input_ids": ids[2:]}]
    both = collect_statistics(model, loaders={"a": first, "b": second}, progress=False)
    assert set(both.corpora) == {"a", "b"}
    merged = collect_statistics(model, loaders={"a": first}, progress=False).merge(
        collect_statistics(model, loaders={"b": second}, progress=False)
    )
    assert merged.digest == both.digest
    assert_same(both, collect(model, ids), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3_grouped"])
def test_channel_experts_of_full_width_give_the_stock_statistics(name):
    stock, converted = tiny_model(name), tiny_model(name)
    convert_experts(converted)
    ids = random_tokens()
    assert_same(collect(stock, ids), collect(converted, ids), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(collect(stock, ids).weights, collect(converted, ids).weights, rtol=1e-6, atol=1e-7)


def test_experts_of_unequal_width_are_measured_like_masked_ones():
    pruned, masked = tiny_model(), tiny_model()
    prune_half(pruned)
    ids = random_tokens()
    for layer in moe_layers(masked):
        layer.experts.down_proj.data[1::2, :, WIDTH // 2 :] = 0
    ragged, full = collect(pruned, ids), collect(masked, ids)
    assert ragged.shape.layers[0].widths == (32, 16) * 4
    for mine, theirs in zip(ragged.total(), full.total(), strict=True):
        for name in ("attribution", "ablation", "output_gram", "layer_energy"):
            torch.testing.assert_close(mine[name], theirs[name], rtol=1e-4, atol=1e-7)
        first = mine["channel_ablation"].split((32, 16) * 4)[1]
        torch.testing.assert_close(first, theirs["channel_ablation"][32:48], rtol=1e-4, atol=1e-9)


def test_packed_experts_are_measured_as_what_they_hold():
    packed, dense = tiny_model(), tiny_model()
    for model in (packed, dense):
        prune_half(model)
        for layer in moe_layers(model):
            pack_experts(layer.experts)
    for layer in moe_layers(dense):
        unpack_experts(layer.experts, dtype=torch.float32)
    ids = random_tokens()
    assert all(layer.experts.packed for layer in moe_layers(packed))
    assert_same(collect(packed, ids), collect(dense, ids), rtol=1e-6)


def test_weight_norms_are_those_of_each_channel():
    model = tiny_model("mixtral")
    layer = moe_layers(model)[1]
    gate_nH, up_nH, down_nH = expert_matrices(layer.experts, 3, dtype=torch.float64)
    weights = collect(model, random_tokens()).weights[1]
    part = slice(3 * WIDTH, 4 * WIDTH)
    for name, matrix in {"gate_sq_norm": gate_nH, "up_sq_norm": up_nH, "down_sq_norm": down_nH}.items():
        torch.testing.assert_close(weights[name][part], matrix.detach().pow(2).sum(1))
        sums = weights[name.replace("sq_norm", "abs_sum")]
        torch.testing.assert_close(sums[part], matrix.detach().abs().sum(1))


def test_weight_norms_of_long_float32_rows_are_exact_to_seven_digits():
    experts = moe_layers(tiny_model(hidden_size=1100))[0].experts
    norms = weight_norms(experts)
    gate_nH, _, down_nH = expert_matrices(experts, 0, dtype=torch.float64)
    for name, matrix in {"gate_sq_norm": gate_nH, "down_sq_norm": down_nH}.items():
        torch.testing.assert_close(norms[name][:WIDTH], matrix.detach().square().sum(1), rtol=1e-7, atol=0.0)
        sums_C = norms[name.replace("sq_norm", "abs_sum")]
        torch.testing.assert_close(sums_C[:WIDTH], matrix.detach().abs().sum(1), rtol=1e-7, atol=0.0)


def test_float32_sums_over_a_long_batch_are_those_of_float64():
    """65,536 tokens in one batch on the same routing: only the rounding of activations and sums differs."""
    generator = torch.Generator().manual_seed(0)
    hidden_TH = torch.randn(65536, 64, generator=generator)
    weights_TK, index_TK = torch.rand(65536, NUM_EXPERTS, generator=generator).softmax(-1).topk(2)
    output_TH = torch.randn(65536, 64, generator=generator)
    sums = []
    for dtype in (torch.float32, torch.float64):
        tokens = CountedTokens.from_mask(None, num_tokens=65536, device=torch.device("cpu"))
        experts = moe_layers(tiny_model())[0].experts.to(dtype)
        measured = LayerMeasurement(experts, tokens=tokens, outputs=OutputBuffer())
        with torch.no_grad():
            routed_TH = measured.run(hidden_TH.to(dtype), index_TK, weights_TK.to(dtype))
            sums.append(measured.finish(routed_TH + output_TH.to(dtype), scale=1.0))
        sums[-1] |= router_sums(5 * hidden_TH[:, :NUM_EXPERTS].to(dtype), score="softmax")
    for name, exact in sums[1].items():
        # Terms of both signs cancel in the sum of z: its rounding is relative to the sum of ||z||.
        scale = sums[1]["norm"] if name == "output_sum" else exact
        tolerance = 1e-5 * float(scale.abs().max())
        torch.testing.assert_close(sums[0][name].double(), exact.double(), rtol=1e-5, atol=tolerance, msg=name)


@pytest.mark.parametrize("moments", [False, True])
def test_peak_memory_stays_below_two_layers_of_routed_activations(moments):
    model, ids = tiny_model(num_hidden_layers=4), random_tokens(batch=4, length=256)

    def plain() -> None:
        with torch.no_grad():
            model.get_decoder()(input_ids=ids, use_cache=False)

    plain()
    collect(model, ids, moments=moments)
    # Input, gate, up, hidden and output of every routed pair, in float32.
    top_k = moe_layers(model)[0].router.top_k
    layer_bytes = ids.numel() * top_k * (2 * model.config.hidden_size + 3 * WIDTH) * 4
    extra = peak_bytes(lambda: collect(model, ids, moments=moments)) - peak_bytes(plain)
    assert extra <= 2 * layer_bytes, extra / layer_bytes


def test_router_probability_and_entropy_by_hand():
    model = tiny_model("olmoe")
    layer = moe_layers(model)[0]
    layer.router.weight.data.zero_()
    sums = collect(model, random_tokens(batch=1, length=10)).total()[0]
    # Zero logits: every expert gets 1/8 of each of 10 tokens, and the entropy is log 8, the last bin.
    torch.testing.assert_close(sums["router_probability"], torch.full((8,), 10 / 8, dtype=torch.float64))
    assert sums["entropy_histogram"].tolist() == [0.0] * 31 + [10.0]


def test_granite_scales_the_routed_sum_by_its_residual_multiplier():
    ids = random_tokens()
    sums = [collect(tiny_model("granitemoe", residual_multiplier=m), ids).total()[0] for m in (0.22, 1e-4)]
    # The smaller multiplier leaves the layer's output all but unchanged, so q is the same up to that.
    ratio = float(sums[1]["layer_energy"] / sums[0]["layer_energy"])
    assert ratio == pytest.approx((1e-4 / 0.22) ** 2, rel=0.3)


def test_moments_can_be_left_out():
    model, ids = tiny_model(), random_tokens()
    with_them, without = collect(model, ids).total()[0], collect(model, ids, moments=False).total()[0]
    assert with_them.keys() - without.keys() == MOMENTS
    for name, value in without.items():
        torch.testing.assert_close(value, with_them[name])


def test_an_expert_that_no_token_uses_has_zeros():
    model = tiny_model("deepseek_v3")
    moe_layers(model)[0].router.e_score_correction_bias[2] = -10.0
    sums = collect(model, random_tokens()).total()[0]
    assert float(sums["count"][2]) == 0
    assert float(sums["channel_ablation"][2 * WIDTH : 3 * WIDTH].abs().max()) == 0
    assert float(sums["max_abs"][2]) == 0
    assert float(sums["router_probability"][2]) > 0


def interrupted(collector: CalibrationCollector) -> None:
    with collector.batch(corpus="text"):
        assert not collector.model.training
        assert "forward" in vars(collector.layers[0].experts)
        collector.model.get_decoder()(input_ids=random_tokens(), use_cache=False)
        raise KeyError("in the middle")


@pytest.mark.parametrize("prepare", [lambda model: None, convert_experts])
def test_everything_is_as_before_after_an_exception(prepare):
    model = tiny_model("qwen2_moe")
    prepare(model)
    model.train()
    model.get_decoder().layers[0].self_attn.eval()
    layers = moe_layers(model)
    keys = [set(vars(module)) for module in model.modules()]
    implementation = model.config._experts_implementation
    with pytest.raises(KeyError, match="in the middle"), CalibrationCollector(model) as collector:
        interrupted(collector)
    assert [set(vars(module)) for module in model.modules()] == keys
    assert not any(module._forward_hooks for module in model.modules())
    assert model.training
    assert not model.get_decoder().layers[0].self_attn.training
    assert model.config._experts_implementation == implementation
    assert isinstance(layers[0].experts, ChannelExperts) is (prepare is convert_experts)


def test_parameters_get_no_gradient_and_can_still_be_trained():
    model, ids = tiny_model(), random_tokens()
    with torch.inference_mode():
        first = collect(model, ids)
    assert_same(first, collect(model, ids), rtol=1e-12)
    assert all(parameter.grad is None for parameter in model.parameters())
    model(input_ids=ids).logits.sum().backward()
    assert moe_layers(model)[0].experts.down_proj.grad is not None
