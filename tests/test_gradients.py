"""Derivatives of the loss with respect to channels against autograd on the stock model's own weights."""

import pytest
import torch
from cli_runs import run, save_job
from random_plans import random_plan
from tiny_models import VOCAB_SIZE, WIDTH, random_tokens, tiny_model
from torch.nn import functional

from lightning_moe.calibration.collector import collect_statistics
from lightning_moe.calibration.gradients import collect_gradients
from lightning_moe.criteria import CHANNEL_CRITERIA
from lightning_moe.models.discovery import moe_layers
from lightning_moe.quantization.nf4 import pack_experts
from lightning_moe.records import CalibrationStatistics
from lightning_moe.surgery.cut import apply_plan
from lightning_moe.surgery.novices import mean_outputs

FAMILIES = ("qwen3_moe", "deepseek_v2", "deepseek_v3", "granitemoe", "qwen3_next")


def gradients(model, *batches):
    return collect_gradients(model, loaders={"text": list(batches)}, progress=False)["text"]


def derivatives(model, ids_S):
    """Per layer `sum W_down dL/dW_down` over each channel's column, on one row of text: `[C]`."""
    model.zero_grad()
    logits_SV = model(input_ids=ids_S[None], use_cache=False).logits[0]
    functional.cross_entropy(logits_SV[:-1], ids_S[1:], reduction="sum").backward()
    downs = [layer.experts.down_proj for layer in moe_layers(model)]
    return [(down.grad * down.detach()).sum(1).flatten() for down in downs]


@pytest.mark.parametrize("family", FAMILIES)
def test_sums_equal_weight_times_gradient_of_the_stock_model(family):
    model = tiny_model(family, dtype=torch.float64)
    ids_BS = random_tokens(batch=3, length=12)
    rows = [derivatives(model, ids_S) for ids_S in ids_BS]
    for layer, sums in enumerate(gradients(model, {"input_ids": ids_BS})):
        of_layer_BC = torch.stack([row[layer] for row in rows])
        torch.testing.assert_close(sums["loss_snip"], of_layer_BC.sum(0), rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(sums["loss_taylor"], of_layer_BC.square().sum(0), rtol=1e-8, atol=1e-14)
        assert float(sums["loss_taylor"].max()) > 0


def test_the_derivative_is_that_of_the_loss_itself():
    # Without any autograd: the loss with one column of W_down a little larger and a little smaller.
    model = tiny_model(dtype=torch.float64)
    ids_BS = random_tokens(batch=1, length=24)
    sums = gradients(model, {"input_ids": ids_BS})[0]
    channel = int(sums["loss_snip"].abs().argmax())
    column_H = moe_layers(model)[0].experts.down_proj.data[channel // WIDTH, :, channel % WIDTH]
    losses = []
    with torch.no_grad():
        for factor in (1.01, 0.99 / 1.01):
            column_H.mul_(factor)
            logits_PV = model(input_ids=ids_BS, use_cache=False).logits[:, :-1].reshape(-1, VOCAB_SIZE)
            losses.append(float(functional.cross_entropy(logits_PV, ids_BS[:, 1:].flatten(), reduction="sum")))
    # Norms and routers compute in float32 even here, so a small step would drown in rounding.
    assert (losses[0] - losses[1]) / 0.02 == pytest.approx(float(sums["loss_snip"][channel]), rel=5e-3)


def test_batching_does_not_matter():
    model = tiny_model(dtype=torch.float64)
    ids_BS = random_tokens(batch=4, length=12)
    whole = gradients(model, {"input_ids": ids_BS})
    parts = gradients(model, {"input_ids": ids_BS[:1]}, {"input_ids": ids_BS[1:]})
    for one, other in zip(whole, parts, strict=True):
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(side):
    model = tiny_model(dtype=torch.float64)
    ids_BS = random_tokens(batch=2, length=12)
    padding = (3, 0) if side == "left" else (0, 3)
    padded = {
        "input_ids": functional.pad(ids_BS, padding),
        "attention_mask": functional.pad(torch.ones_like(ids_BS), padding),
    }
    for one, other in zip(gradients(model, {"input_ids": ids_BS}), gradients(model, padded), strict=True):
        # Rotary positions are relative, so the left side needs no position_ids for the same loss.
        torch.testing.assert_close(other["loss_snip"], one["loss_snip"], rtol=1e-5, atol=1e-8)


def test_channel_experts_give_the_sums_of_their_channels():
    # Cut channels score 0 in a model where they are zero; kept ones score the same.
    dense, cut = tiny_model(dtype=torch.float64), tiny_model(dtype=torch.float64)
    plan = random_plan(cut)
    apply_plan(cut, plan=plan)
    for layer, keep_C in zip(moe_layers(dense), plan.keep, strict=True):
        layer.experts.down_proj.data.mul_(keep_C.view(-1, 1, WIDTH))
    batch = {"input_ids": random_tokens(batch=2, length=12)}
    for keep_C, masked, own in zip(plan.keep, gradients(dense, batch), gradients(cut, batch), strict=True):
        for name in ("loss_snip", "loss_taylor"):
            torch.testing.assert_close(own[name], masked[name][keep_C], rtol=1e-9, atol=1e-15)
            assert float(masked[name][~keep_C].abs().max()) == 0


def test_the_model_is_as_before():
    model = tiny_model().train()
    frozen = model.get_input_embeddings().weight.requires_grad_(False)
    gradients(model, {"input_ids": random_tokens()})
    assert model.training
    assert [p is frozen for p in model.parameters()] == [not p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())
    assert not model.get_input_embeddings()._forward_hooks
    assert "forward" not in vars(moe_layers(model)[0].experts)


def test_flags_come_back_after_an_exception():
    model = tiny_model()
    with pytest.raises(
        ValueError, match=r"has token 128, and the model knows 0 to 127\. Tokenise with the model's own"
    ):
        gradients(model, {"input_ids": torch.full((1, 4), VOCAB_SIZE)})
    assert all(p.requires_grad for p in model.parameters())
    assert not model.get_input_embeddings()._forward_hooks


def test_sums_join_the_statistics_and_survive_the_disk(tmp_path):
    model = tiny_model()
    loaders = {name: [{"input_ids": random_tokens(seed=seed)}] for seed, name in enumerate("ab")}
    statistics = collect_statistics(model, loaders=loaders, progress=False)
    joined = statistics.with_sums(collect_gradients(model, loaders=loaders, progress=False))
    joined.save(tmp_path / "s")
    loaded = CalibrationStatistics.load(tmp_path / "s")
    for name, sums in {"snip": "loss_snip", "taylor": "loss_taylor"}.items():
        expected = sum(joined.corpora[corpus][1][sums] for corpus in "ab").abs()
        torch.testing.assert_close(CHANNEL_CRITERIA[name](loaded).scores[1], expected)
    assert torch.equal(joined.corpora["a"][0]["count"], statistics.corpora["a"][0]["count"])
    longer = {name: [*batches, {"input_ids": random_tokens(seed=9)}] for name, batches in loaders.items()}
    with pytest.raises(ValueError, match=r"`sums` of corpus 'a' are of 64 tokens, these statistics of 32"):
        statistics.with_sums(collect_gradients(model, loaders=longer, progress=False))


def test_what_cannot_be_is_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match="needs at least one corpus, got none"):
        collect_gradients(model, loaders={}, progress=False)
    with pytest.raises(ValueError, match="Corpus 'text' has no batch"):
        collect_gradients(model, loaders={"text": []}, progress=False)
    apply_plan(model, plan=random_plan(model))
    for layer in moe_layers(model):
        pack_experts(layer.experts)
    with pytest.raises(ValueError, match=r"'model.layers.0.mlp.experts' is packed to 4 bit.*`--gradients true`"):
        gradients(model, {"input_ids": random_tokens()})


def test_novices_pass_as_constants():
    # A cut model with constants in place of evicted experts, against autograd through its own forward.
    model = tiny_model(dtype=torch.float64)
    batch = {"input_ids": random_tokens(batch=2, length=12)}
    statistics = collect_statistics(model, loaders={"text": [batch]}, progress=False)
    plan = random_plan(model, evicted=[[1, 4], [2]])
    apply_plan(model, plan=plan, novices=mean_outputs(statistics, plan=plan))
    sums = gradients(model, batch)
    logits_PV = model(**batch, use_cache=False).logits[:, :-1].reshape(-1, VOCAB_SIZE)
    functional.cross_entropy(logits_PV, batch["input_ids"][:, 1:].flatten(), reduction="sum").backward()
    for layer, of_layer in zip(moe_layers(model), sums, strict=True):
        assert layer.experts.novices is not None
        rows_CH = layer.experts.get_parameter("down_proj.weight")
        derivative_C = (rows_CH.grad * rows_CH.detach()).sum(1)[layer.experts.storage_order()]
        torch.testing.assert_close(of_layer["loss_snip"], derivative_C, rtol=1e-8, atol=1e-12)


def test_the_command_writes_them(tmp_path):
    folder = save_job(tmp_path)
    out = folder / "statistics.safetensors"
    run("calibrate", "--config", folder / "data.yaml", "--model", folder / "model", "--out", out, "--gradients", "true")
    statistics = CalibrationStatistics.load(out)
    assert all(
        float(score_C.max()) > 0 for name in ("snip", "taylor") for score_C in CHANNEL_CRITERIA[name](statistics).scores
    )
