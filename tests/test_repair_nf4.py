"""Repair after NF4: equal to explicit least squares on what 4-bit experts compute, and closer to the whole model.

T tokens, S routed pairs of one expert, n channels of an expert, k kept, H hidden.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from alike_channels import alike_model
from layer_reference import RealLayer
from random_plans import alike_plan, mixed_keep
from tiny_models import NUM_EXPERTS, WIDTH, random_tokens, tiny_model
from torch import Tensor
from torch.nn import functional

from lightning_moe.calibration.collector import collect_statistics
from lightning_moe.calibration.gram import iterate_grams
from lightning_moe.commands.pruning import prune
from lightning_moe.models.discovery import moe_layers
from lightning_moe.models.loading import load_model
from lightning_moe.quantization.linears import quantize_model
from lightning_moe.quantization.nf4 import PackedRows, pack_experts
from lightning_moe.surgery import after_nf4
from lightning_moe.surgery.after_nf4 import RoundedChannels, rounded_rows
from lightning_moe.surgery.cut import apply_plan, convert_experts
from lightning_moe.surgery.least_squares import refit_rows
from lightning_moe.surgery.repair import has_rows_to_fit, plan_repair

FLOAT64 = torch.float64


def everything() -> Tensor:
    return torch.ones(NUM_EXPERTS * WIDTH, dtype=torch.bool)


def loaders(*, batches: int = 4) -> dict[str, list[dict[str, Tensor]]]:
    return {"text": [{"input_ids": random_tokens(batch=4, length=64, seed=seed)} for seed in range(batches)]}


def unpacked(weight_nH: Tensor) -> Tensor:
    return PackedRows.pack(weight_nH).rows(0, len(weight_nH), FLOAT64)


def rounded_activations(experts, expert: int, *, input_SH: Tensor, keep_n: Tensor) -> Tensor:
    """The kept channels of a stock expert whose kept gate and up rows went to 4 bit and back, `[S, k]`."""
    gate_nH, up_nH = experts.gate_up_proj[expert].detach().chunk(2)
    gate_kH, up_kH = (unpacked(rows_nH[keep_n]) for rows_nH in (gate_nH, up_nH))
    return functional.silu(input_SH @ gate_kH.T) * (input_SH @ up_kH.T)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "granitemoe"])
@pytest.mark.parametrize("expert", [0, 2])
def test_the_rows_equal_a_direct_fit_on_what_the_packed_channels_give(name, expert):
    model = alike_model(name, noise=0.3, dtype=FLOAT64)
    plan = alike_plan(model, keep_C=mixed_keep())
    text = {"text": [{"input_ids": random_tokens(batch=32, length=64)}]}
    wanted = [[expert], [expert]]
    grams = list(iterate_grams(model, loaders=text, experts=wanted, columns=RoundedChannels(plan=plan), progress=False))
    keep_n, gram = plan.keep[1].split(WIDTH)[expert], grams[1]
    experts = moe_layers(model)[1].experts
    down_nH = experts.down_proj[expert].detach().T
    one = refit_rows(
        kept_kH=down_nH[keep_n],
        lost_dH=down_nH,
        half_a=gram.half_a[expert],
        half_b=gram.half_b[expert],
        num_tokens=10**9,  # far beyond noise: the ridge is free
        num_channels=WIDTH,
    )
    real = RealLayer(model, text["text"][0], layer_index=1)
    routed = real.routed()[expert]
    scale = real.layer.family.output_scale(model.config)
    weight_S1 = (routed.gate_S * real.inverse_T[routed.token_S].sqrt() * scale).unsqueeze(1)
    hidden_Sk = weight_S1 * rounded_activations(experts, expert, input_SH=real.hidden_TH[routed.token_S], keep_n=keep_n)
    target_SH = weight_S1 * routed.z_SH.detach()
    assert one.error_before == pytest.approx(float((hidden_Sk @ down_nH[keep_n] - target_SH).square().sum()), rel=1e-6)
    assert one.ridge is not None
    # The ridge as extra rows that pull towards the rows as they were.
    strength = (one.ridge * hidden_Sk.square().sum(0).mean()).sqrt()
    left = torch.cat([hidden_Sk, strength * torch.eye(int(keep_n.sum()), dtype=FLOAT64)])
    expected_kH = torch.linalg.lstsq(left, torch.cat([target_SH, strength * down_nH[keep_n]])).solution
    torch.testing.assert_close(one.down_rows, expected_kH, rtol=1e-5, atol=1e-8)


def test_rounding_with_error_feedback_equals_solving_anew_after_every_row(monkeypatch):
    monkeypatch.setattr(after_nf4, "_BLOCK", 5)  # three blocks, the last one shorter
    generator = torch.Generator().manual_seed(0)
    rows_kH = torch.randn(12, 64, generator=generator, dtype=FLOAT64)
    hidden_Sk = torch.randn(200, 4, generator=generator, dtype=FLOAT64) @ torch.randn(
        4, 12, generator=generator, dtype=FLOAT64
    )
    hidden_Sk += 0.1 * torch.randn(200, 12, generator=generator, dtype=FLOAT64)
    gram_kk = hidden_Sk.T @ hidden_Sk
    found_kH = rounded_rows(rows_kH, gram_kk=gram_kk, ridge=1e-3)
    ridged_kk = gram_kk + 1e-3 * gram_kk.diagonal().mean() * torch.eye(12, dtype=FLOAT64)
    # Error E minimises tr(E^T G E) over the rows that are still free, those that are rounded given.
    order = gram_kk.diagonal().argsort(descending=True).tolist()
    expected_kH, free_kH = torch.empty_like(rows_kH), rows_kH.clone()
    for done, row in enumerate(order, start=1):
        expected_kH[row] = unpacked(free_kH[row : row + 1])
        fixed, free = order[:done], order[done:]
        error_fH = expected_kH[fixed] - rows_kH[fixed]
        if free:
            shift_fH = torch.linalg.solve(ridged_kk[free][:, free], ridged_kk[free][:, fixed] @ error_fH)
            free_kH[free] = rows_kH[free] - shift_fH
    torch.testing.assert_close(found_kH, expected_kH, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(unpacked(found_kH), found_kH, rtol=1e-6, atol=1e-9)
    feedback, plain = ((hidden_Sk @ (found - rows_kH)).square().sum() for found in (found_kH, unpacked(rows_kH)))
    assert feedback < 0.5 * plain


def packed_experts(model):
    for layer in moe_layers(model):
        pack_experts(layer.experts)
    return model


def output_error(model, whole) -> float:
    """Of the experts of layer 1 on held-out tokens, inputs and routing as in the whole model."""
    real = RealLayer(whole, {"input_ids": random_tokens(batch=8, length=64, seed=99)}, layer_index=1)
    inputs = real.hidden_TH, real.index_TK, real.weights_TK
    with torch.no_grad():
        outputs = [moe_layers(one)[1].experts(*inputs) for one in (model, whole)]
    return float((outputs[0] - outputs[1]).square().mean())


@pytest.mark.parametrize(("share", "gain"), [(0.5, 0.95), (1.0, 0.8)], ids=["cut", "whole"])
def test_packed_experts_are_closer_to_the_whole_ones_than_with_the_ordinary_repair(share, gain):
    whole = alike_model(noise=0.05)
    plan = alike_plan(whole, keep_C=torch.arange(NUM_EXPERTS * WIDTH) % WIDTH < share * WIDTH)
    errors = []
    for rounded in (True, False):
        model = alike_model(noise=0.05)
        repair = plan_repair(model, plan=plan, loaders=loaders(batches=8), after_nf4=rounded, progress=False)
        apply_plan(model, plan=plan, repair=repair)
        errors.append(output_error(packed_experts(model), whole))
    assert errors[0] < gain * errors[1]


def test_the_rows_survive_packing():
    model = alike_model()
    plan = alike_plan(model, keep_C=mixed_keep())
    repair = plan_repair(model, plan=plan, loaders=loaders(batches=8), after_nf4=True, progress=False)
    assert min(repair.num_repaired) >= 4
    apply_plan(model, plan=plan, repair=repair)
    before = [layer.experts.down_proj.weight.detach().clone() for layer in moe_layers(model)]
    quantize_model(model)
    pairs = zip(before, (layer.experts.down_proj for layer in moe_layers(model)), strict=True)
    same = [torch.isclose(rows_CH, packed.rows(0, len(rows_CH), torch.float32), rtol=1e-5) for rows_CH, packed in pairs]
    kept_rows = sum(int(same_CH.all(1).sum()) for same_CH in same)
    # Only rows of experts that no refit won for were not rounded before.
    assert kept_rows > 0.5 * sum(len(rows) for rows in before)


def test_experts_that_are_packed_already_are_fitted_as_they_are():
    model = packed_experts(converted(alike_model()))
    plan = alike_plan(model, keep_C=mixed_keep())
    options = {"plan": plan, "loaders": loaders(batches=1), "progress": False}
    mine, plain = (plan_repair(model, after_nf4=rounded, **options) for rounded in (True, False))
    assert mine.error_before == pytest.approx(plain.error_before, rel=1e-4)
    nothing_lost = plan_repair(model, **(options | {"plan": alike_plan(model, keep_C=everything())}), after_nf4=True)
    assert max(nothing_lost.error_before) < 1e-6 * max(plain.error_before)


def converted(model):
    convert_experts(model)
    return model


def test_whether_there_is_something_to_fit():
    model = tiny_model()
    whole_experts = alike_plan(model, keep_C=torch.arange(NUM_EXPERTS * WIDTH) >= WIDTH)
    assert not has_rows_to_fit(whole_experts)
    assert has_rows_to_fit(whole_experts, after_nf4=True)
    assert has_rows_to_fit(alike_plan(model, keep_C=mixed_keep()))
    assert not has_rows_to_fit(alike_plan(model, keep_C=everything()))


def test_a_model_that_cannot_be_packed_is_refused():
    model = tiny_model(hidden_size=32)
    plan = alike_plan(model, keep_C=everything())
    with pytest.raises(ValueError, match="multiple of 64, got 32"):
        plan_repair(model, plan=plan, loaders=loaders(), after_nf4=True, progress=False)


def test_grams_of_the_channels_as_they_were_are_refused():
    model = tiny_model()
    plan = alike_plan(model, keep_C=mixed_keep())
    with pytest.raises(ValueError, match="`grams` are of 16-bit channels, and a repair after NF4 takes its own"):
        plan_repair(model, plan=plan, loaders={}, after_nf4=True, grams=[])


def pruned_by_command(folder: Path, *, keep_C: Tensor, **settings: Any):
    """The model that `prune` writes; its source is `alike_model`."""
    model = alike_model(noise=0.05)
    model.save_pretrained(folder / "source")
    plan = alike_plan(model, keep_C=keep_C)
    plan.save(folder / "plan.json")
    tokenizer = SimpleNamespace(save_pretrained=lambda out: None)
    data: Any = SimpleNamespace(calibration_dataloaders=lambda: loaders(batches=8), tokenizer=tokenizer)
    named = {"model": str(folder / "source"), "plan": str(folder / "plan.json"), "out": str(folder / "out")}
    prune(data=data, device="cpu", **named, **settings)
    return load_model(str(folder / "out"))


def test_the_command_repairs_after_nf4_where_nothing_is_cut(tmp_path):
    found = pruned_by_command(tmp_path, keep_C=everything(), repair="after_nf4")
    expected = alike_model(noise=0.05)
    plan = alike_plan(expected, keep_C=everything())
    repair = plan_repair(expected, plan=plan, loaders=loaders(batches=8), after_nf4=True, progress=False)
    apply_plan(expected, plan=plan, repair=repair)
    quantize_model(expected)
    for mine, theirs in zip(moe_layers(found), moe_layers(expected), strict=True):
        assert torch.equal(mine.experts.down_proj.codes, theirs.experts.down_proj.codes)
    with pytest.raises(ValueError, match="`repair: after_nf4` fits to 4-bit weights, got `quantize: none`"):
        pruned_by_command(tmp_path, keep_C=everything(), repair="after_nf4", quantize="none")


def test_the_command_leaves_novices_behind(tmp_path):
    statistics = collect_statistics(alike_model(noise=0.05), loaders=loaders(batches=1), progress=False)
    statistics.save(tmp_path / "statistics.safetensors")
    keep_C = torch.arange(NUM_EXPERTS * WIDTH) >= WIDTH
    found = pruned_by_command(tmp_path, keep_C=keep_C, novices=str(tmp_path / "statistics.safetensors"))
    assert [layer.experts.novice_experts for layer in moe_layers(found)] == [(0,), (0,)]
    mean_H = statistics.total()[0]["output_sum"][0] / statistics.total()[0]["count"][0]
    torch.testing.assert_close(moe_layers(found)[0].experts.novices[0].double(), mean_H, rtol=1e-4, atol=1e-6)
