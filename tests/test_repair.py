"""Least-squares repair: equal to a direct fit on activations, and harmless where tokens are few."""

import pytest
import torch
from random_plans import alike_plan, mixed_keep
from tiny_models import NUM_EXPERTS, WIDTH, random_tokens, tiny_model
from torch import Tensor
from torch.nn import functional

from lightning_moe.models.channel_experts import ChannelExperts
from lightning_moe.models.discovery import expert_matrices, moe_layers
from lightning_moe.quantization.nf4 import pack_experts
from lightning_moe.surgery.cut import apply_plan, convert_experts
from lightning_moe.surgery.least_squares import RIDGES, SCARCE_RIDGE, ExpertRepair, repaired_down_rows
from lightning_moe.surgery.repair import plan_repair

HIDDEN, CHANNELS = 32, 64


def sample(num_tokens: int, *, rank: int, generator: torch.Generator, gates: tuple[Tensor, Tensor]) -> Tensor:
    """Activations of a gated expert whose inputs have `rank` dimensions: the fewer, the more alike the channels."""
    input_Tr = torch.randn(num_tokens, rank, generator=generator, dtype=torch.float64)
    weight_T1 = torch.rand(num_tokens, 1, generator=generator, dtype=torch.float64) + 0.1
    return functional.silu(input_Tr @ gates[0]) * (input_Tr @ gates[1]) * weight_T1


def make_expert(*, rank: int, seed: int) -> tuple[torch.Generator, tuple[Tensor, Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64) / size[0] ** 0.5

    keep_n = torch.rand(CHANNELS, generator=generator) < 0.5
    return generator, (2 * normal(rank, CHANNELS), normal(rank, CHANNELS)), normal(CHANNELS, HIDDEN), keep_n


def fit(hidden_Tn: Tensor, *, down_nH: Tensor, keep_n: Tensor, **options) -> ExpertRepair:
    half_a, half_b = (half.T @ half for half in (hidden_Tn[::2], hidden_Tn[1::2]))
    return repaired_down_rows(
        down_nH=down_nH, keep_n=keep_n, half_a=half_a, half_b=half_b, num_tokens=len(hidden_Tn), **options
    )


def relative_error(rows_kH: Tensor, *, hidden_Tn: Tensor, down_nH: Tensor, keep_n: Tensor) -> float:
    """Squared output error of the cut expert, relative to that of the cut without repair."""
    true_TH = hidden_Tn @ down_nH
    errors = [(hidden_Tn[:, keep_n] @ rows - true_TH).square().sum() for rows in (rows_kH, down_nH[keep_n])]
    return float(errors[0] / errors[1])


def test_the_rows_equal_a_direct_least_squares_fit_on_activations():
    generator, gates, down_nH, keep_n = make_expert(rank=8, seed=0)
    hidden_Tn = sample(600, rank=8, generator=generator, gates=gates)
    repair = fit(hidden_Tn, down_nH=down_nH, keep_n=keep_n)
    assert repair.ridge is not None
    # The ridge as extra rows of a plain least-squares problem for the change of the kept rows.
    kept_Tk, num_kept = hidden_Tn[:, keep_n], int(keep_n.sum())
    strength = (repair.ridge * kept_Tk.square().sum(0).mean()).sqrt()
    left = torch.cat([kept_Tk, strength * torch.eye(num_kept, dtype=torch.float64)])
    right = torch.cat([hidden_Tn[:, ~keep_n] @ down_nH[~keep_n], torch.zeros(num_kept, HIDDEN, dtype=torch.float64)])
    expected = down_nH[keep_n] + torch.linalg.lstsq(left, right).solution
    torch.testing.assert_close(repair.down_rows, expected, rtol=1e-6, atol=1e-8)


def test_the_predicted_errors_are_those_of_the_activations():
    generator, gates, down_nH, keep_n = make_expert(rank=8, seed=1)
    hidden_Tn = sample(400, rank=8, generator=generator, gates=gates)
    repair = fit(hidden_Tn, down_nH=down_nH, keep_n=keep_n)
    lost_TH = hidden_Tn[:, ~keep_n] @ down_nH[~keep_n]
    assert repair.error_before == pytest.approx(float(lost_TH.square().sum()), rel=1e-9)
    # Error of each half under rows fitted on the other one alone.
    after = 0.0
    for mine, other in ((hidden_Tn[::2], hidden_Tn[1::2]), (hidden_Tn[1::2], hidden_Tn[::2])):
        kk = other[:, keep_n].T @ other[:, keep_n]
        ridge_kk = repair.ridge * kk.diagonal().mean() * torch.eye(len(kk), dtype=torch.float64)
        change = torch.linalg.solve(kk + ridge_kk, other[:, keep_n].T @ other[:, ~keep_n]) @ down_nH[~keep_n]
        after += float((mine[:, keep_n] @ change - mine[:, ~keep_n] @ down_nH[~keep_n]).square().sum())
    assert repair.error_after == pytest.approx(after, rel=1e-6)
    assert repair.error_after < repair.error_before


@pytest.mark.parametrize(("rank", "mean"), [(4, 0.0), (8, 0.0), (8, 30.0)])
def test_float32_grams_repair_as_well_as_float64_ones(rank, mean):
    """Also where a mean shared by all channels dominates the Gram (its largest eigenvalue is nearly its trace)."""
    generator, gates, down_nH, keep_n = make_expert(rank=rank, seed=2)
    hidden_Tn = sample(1500, rank=rank, generator=generator, gates=gates) + mean
    half_a, half_b = (half.T @ half for half in (hidden_Tn[::2], hidden_Tn[1::2]))
    exact, rough = (
        repaired_down_rows(
            down_nH=down_nH, keep_n=keep_n, half_a=half_a.to(dtype), half_b=half_b.to(dtype), num_tokens=1500
        )
        for dtype in (torch.float64, torch.float32)
    )
    assert exact.ridge is not None
    assert rough.error_before == pytest.approx(exact.error_before, rel=1e-4)
    errors = [
        relative_error(one.down_rows.double(), hidden_Tn=hidden_Tn, down_nH=down_nH, keep_n=keep_n)
        for one in (rough, exact)
    ]
    assert errors[0] <= 1.01 * errors[1] + 1e-6


@pytest.mark.parametrize(
    ("noise", "outlier", "relative"),
    [(0.0, 1.0, 0.0), (1e-4, 1.0, 0.0), (1e-3, 1e2, 0.0), (1e-3, 1e3, 0.1)],
)
def test_float32_grams_choose_and_report_as_float64_ones_with_tiny_errors_and_outlier_tokens(noise, outlier, relative):
    """Up to 10^-6 of the error without repair; a thousandfold token hides the others in the last digits."""
    for seed in range(8):
        generator, _, down_nH, _ = make_expert(rank=8, seed=seed)
        hidden_Tn = torch.randn(1000, 8, generator=generator, dtype=torch.float64)
        hidden_Tn = hidden_Tn @ torch.randn(8, CHANNELS, generator=generator, dtype=torch.float64)
        hidden_Tn += noise * torch.randn(1000, CHANNELS, generator=generator, dtype=torch.float64)
        hidden_Tn[:2] *= outlier
        halves = [half.T @ half for half in (hidden_Tn[::2], hidden_Tn[1::2])]
        exact, rough = (
            repaired_down_rows(
                down_nH=down_nH,
                keep_n=torch.arange(CHANNELS) % 2 == 0,
                half_a=halves[0].to(dtype),
                half_b=halves[1].to(dtype),
                num_tokens=1000,
            )
            for dtype in (torch.float64, torch.float32)
        )
        assert rough.ridge == exact.ridge
        assert rough.error_after >= 0
        bound = 1e-6 * exact.error_before + relative * exact.error_after
        assert abs(rough.error_after - exact.error_after) <= bound


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 4, 8, 16, 32, 63])
@pytest.mark.parametrize("rank", [8, 32, 256])
def test_repair_never_hurts_an_expert_with_fewer_tokens_than_channels(num_tokens, rank):
    for seed in range(40):
        generator, gates, down_nH, keep_n = make_expert(rank=rank, seed=seed)
        repair = fit(sample(num_tokens, rank=rank, generator=generator, gates=gates), down_nH=down_nH, keep_n=keep_n)
        held_out = sample(2000, rank=rank, generator=generator, gates=gates)
        assert relative_error(repair.down_rows, hidden_Tn=held_out, down_nH=down_nH, keep_n=keep_n) <= 1.0
        assert repair.ridge is None or repair.ridge >= SCARCE_RIDGE


def test_repair_of_alike_channels_with_many_tokens_removes_most_of_the_error():
    for seed in range(10):
        generator, gates, down_nH, keep_n = make_expert(rank=4, seed=seed)
        repair = fit(sample(2000, rank=4, generator=generator, gates=gates), down_nH=down_nH, keep_n=keep_n)
        held_out = sample(2000, rank=4, generator=generator, gates=gates)
        assert relative_error(repair.down_rows, hidden_Tn=held_out, down_nH=down_nH, keep_n=keep_n) < 0.3


def test_some_experts_with_few_tokens_are_repaired_and_gain():
    gains = []
    for seed in range(30):
        generator, gates, down_nH, keep_n = make_expert(rank=4, seed=seed)
        repair = fit(sample(48, rank=4, generator=generator, gates=gates), down_nH=down_nH, keep_n=keep_n)
        held_out = sample(2000, rank=4, generator=generator, gates=gates)
        if repair.ridge is not None:
            gains.append(relative_error(repair.down_rows, hidden_Tn=held_out, down_nH=down_nH, keep_n=keep_n))
    assert len(gains) > 10
    assert sum(gains) / len(gains) < 0.7


@pytest.mark.parametrize("kept", [0, CHANNELS])
def test_experts_that_are_whole_or_evicted_stay_as_they_are(kept):
    _, _, down_nH, _ = make_expert(rank=8, seed=0)
    keep_n = torch.arange(CHANNELS) < kept
    empty = torch.empty(0, 0)
    repair = repaired_down_rows(down_nH=down_nH, keep_n=keep_n, half_a=empty, half_b=empty, num_tokens=100)
    assert torch.equal(repair.down_rows, down_nH[:kept])
    assert repair.ridge is None
    assert repair.error_before == repair.error_after == 0.0


def test_a_singular_gram_is_survived():
    _, _, down_nH, keep_n = make_expert(rank=8, seed=0)
    hidden_Tn = torch.ones(500, CHANNELS, dtype=torch.float64)
    repair = fit(hidden_Tn, down_nH=down_nH, keep_n=keep_n)
    # All channels are the same one, so the kept ones can stand in for all of them.
    assert relative_error(repair.down_rows, hidden_Tn=hidden_Tn, down_nH=down_nH, keep_n=keep_n) < 1e-6
    assert repair.ridge == min(RIDGES)


def loaders(*, seed: int = 0, batches: int = 4) -> dict[str, list[dict[str, Tensor]]]:
    return {"text": [{"input_ids": random_tokens(batch=4, length=64, seed=seed + i)} for i in range(batches)]}


def output(model, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3_grouped", "granitemoe"])
def test_a_repaired_cut_is_closer_to_the_whole_model_on_held_out_tokens(name):
    whole, cut, repaired = tiny_model(name), tiny_model(name), tiny_model(name)
    for model in (whole, cut, repaired):
        for layer in moe_layers(model):
            # Alike channels: the second half repeats the first, a little changed.
            gate_up, down = layer.experts.gate_up_proj.data, layer.experts.down_proj.data
            for part in gate_up.chunk(2, dim=1):
                part[:, 16:] = part[:, :16] * 1.1
            down.mul_(5.0)
    plan = alike_plan(cut, keep_C=mixed_keep() if name != "deepseek_v3_grouped" else mixed_keep() | keep_expert(1))
    repair = plan_repair(repaired, plan=plan, loaders=loaders(), progress=False)
    apply_plan(cut, plan=plan)
    apply_plan(repaired, plan=plan, repair=repair)
    ids = random_tokens(batch=4, length=64, seed=99)
    true = output(whole, ids)
    errors = [(output(model, ids) - true).square().mean() for model in (repaired, cut)]
    assert errors[0] < 0.9 * errors[1]
    assert all(after < 0.9 * before for before, after in zip(repair.error_before, repair.error_after, strict=True))
    assert min(repair.num_repaired) >= 4


def keep_expert(expert: int) -> Tensor:
    """Half of one expert's channels."""
    channel_C = torch.arange(NUM_EXPERTS * WIDTH)
    return (channel_C // WIDTH == expert) & (channel_C % 2 == 0)


def test_keeping_everything_changes_nothing():
    model = tiny_model()
    plan = alike_plan(model, keep_C=torch.ones(NUM_EXPERTS * WIDTH, dtype=torch.bool))
    repair = plan_repair(model, plan=plan, loaders=loaders(batches=1), progress=False)
    before = output(model, random_tokens())
    rows = [layer.experts.down_proj.detach().transpose(1, 2).reshape(-1, 64).clone() for layer in moe_layers(model)]
    apply_plan(model, plan=plan, repair=repair)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(repair.down_rows, rows, strict=True))
    torch.testing.assert_close(output(model, random_tokens()), before, rtol=1e-5, atol=1e-5)
    assert repair.error_before == (0.0, 0.0)


@pytest.mark.parametrize("packed", [False, True])
def test_stock_and_channel_experts_end_with_the_same_rows(packed):
    stock, converted = tiny_model(), tiny_model()
    convert_experts(converted)
    if packed:
        for layer in moe_layers(converted):
            pack_experts(layer.experts)
    plan = alike_plan(stock, keep_C=mixed_keep())
    repair = plan_repair(converted, plan=plan, loaders=loaders(), progress=False)
    unrepaired = [expert_matrices(layer.experts, 0, dtype=torch.float32) for layer in moe_layers(converted)]
    apply_plan(converted, plan=plan, repair=repair)
    for index, layer in enumerate(moe_layers(converted)):
        experts = layer.experts
        assert isinstance(experts, ChannelExperts)
        assert experts.packed is packed
        assert experts.widths == tuple(width for width in plan.widths(index) if width)
        rows_CH = torch.cat([expert_matrices(experts, e, dtype=torch.float32)[2] for e in range(experts.num_experts)])
        rows_CH = rows_CH.detach()
        assert rows_CH.shape == repair.down_rows[index].shape
        # Packed rows are dequantised, repaired and packed again: half a step of NF4 at most. Others are exact.
        tolerance = 0.16 * float(rows_CH.abs().max()) if packed else 0.0
        assert float((rows_CH - repair.down_rows[index]).abs().max()) <= tolerance
        # Rows that no repair touched come out bit for bit, packed or not.
        assert torch.equal(rows_CH[:WIDTH], unrepaired[index][2])
    if not packed:
        same = plan_repair(stock, plan=plan, loaders=loaders(), progress=False)
        torch.testing.assert_close(same.down_rows, repair.down_rows, rtol=1e-3, atol=1e-5)


def test_sixteen_bit_models_keep_their_type():
    model = tiny_model(dtype=torch.bfloat16)
    plan = alike_plan(model, keep_C=mixed_keep())
    repair = plan_repair(model, plan=plan, loaders=loaders(batches=1), progress=False)
    apply_plan(model, plan=plan, repair=repair)
    assert {rows.dtype for rows in repair.down_rows} == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_an_optimizer_follows_to_the_repaired_parameters():
    model = tiny_model()
    convert_experts(model)
    plan = alike_plan(model, keep_C=mixed_keep())
    repair = plan_repair(model, plan=plan, loaders=loaders(batches=1), progress=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    apply_plan(model, plan=plan, repair=repair, optimizers=[optimizer])
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in model.parameters()}


def test_several_passes_repair_alike():
    model = tiny_model()
    plan = alike_plan(model, keep_C=mixed_keep())
    options = {"plan": plan, "loaders": loaders(batches=1), "progress": False}
    layer_gb = 2 * 6 * WIDTH**2 * 4 / 2**30
    one, two = plan_repair(model, **options), plan_repair(model, memory_gb=1.2 * layer_gb, **options)
    torch.testing.assert_close(one.down_rows, two.down_rows, rtol=1e-3, atol=1e-5)
    in_parts = plan_repair(model, memory_gb=0.4 * layer_gb, **options)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(in_parts.down_rows, one.down_rows, strict=True))
    assert (in_parts.error_after, in_parts.num_repaired) == (one.error_after, one.num_repaired)


def test_the_summary_has_a_line_per_layer():
    model = tiny_model()
    plan = alike_plan(model, keep_C=mixed_keep())
    lines = plan_repair(model, plan=plan, loaders=loaders(batches=1), progress=False).summary().splitlines()
    assert len(lines) == 3
    assert "error before" in lines[0]


def test_a_repair_of_another_plan_is_refused():
    model = tiny_model()
    plan = alike_plan(model, keep_C=mixed_keep())
    repair = plan_repair(model, plan=plan, loaders=loaders(batches=1), progress=False)
    other = alike_plan(model, keep_C=mixed_keep() | keep_expert(1))
    with pytest.raises(ValueError, match=rf"made for plan {plan.digest[:12]}, got plan {other.digest[:12]}"):
        apply_plan(model, plan=other, repair=repair)
    assert not isinstance(moe_layers(model)[0].experts, ChannelExperts)


def test_a_plan_for_another_model_is_refused():
    plan = alike_plan(tiny_model(seed=1), keep_C=mixed_keep())
    with pytest.raises(ValueError, match="The plan was made for another model"):
        plan_repair(tiny_model(seed=0), plan=plan, loaders=loaders(), progress=False)
