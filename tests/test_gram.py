"""Gram matrices of the second pass: equal to the activations', in halves, in any number of passes."""

import logging

import pytest
import torch
from layer_reference import RealLayer
from tiny_models import MODEL_NAMES, NUM_EXPERTS, WIDTH, random_tokens, tiny_model
from torch import Tensor

from lightning_moe.calibration.collector import collect_statistics
from lightning_moe.calibration.gram import iterate_grams
from lightning_moe.calibration.gram_sums import LayerGram
from lightning_moe.models.discovery import moe_layers
from lightning_moe.quantization.nf4 import pack_experts, unpack_experts
from lightning_moe.surgery.cut import convert_experts

# Bytes of one layer of a tiny model in GiB: two halves of 8 experts of 32 x 32 in fp32.
LAYER_GB = 2 * NUM_EXPERTS * WIDTH**2 * 4 / 2**30


def grams(model, *batches: Tensor, mask: Tensor | None = None, **options) -> list[LayerGram]:
    extra = {} if mask is None else {"attention_mask": mask}
    loaders = {"text": [{"input_ids": ids, **extra} for ids in batches]}
    return list(iterate_grams(model, loaders=loaders, progress=False, **options))


def total(gram: LayerGram, expert: int) -> Tensor:
    return gram.half_a[expert] + gram.half_b[expert]


@pytest.mark.parametrize("name", ["qwen2_moe", "granitemoe", "deepseek_v3_grouped"])
def test_grams_equal_those_of_the_activations(name):
    model = tiny_model(name, dtype=torch.float64)
    inputs = {"input_ids": random_tokens(length=24)}
    gram = grams(model, inputs["input_ids"])[1]
    real = RealLayer(model, inputs, layer_index=1)
    scale = real.layer.family.output_scale(model.config)
    for expert, one in enumerate(real.routed()):
        weight_S = one.gate_S.square() * real.inverse_T[one.token_S] * scale**2
        for half, matrix in ((0, gram.half_a[expert]), (1, gram.half_b[expert])):
            rows = one.token_S % 2 == half
            hidden_Sn = one.h_Sn[rows].detach()
            expected = hidden_Sn.T @ (weight_S[rows, None] * hidden_Sn)
            torch.testing.assert_close(matrix, expected.detach(), rtol=1e-6, atol=1e-12)
        assert gram.counts[expert] == len(one.token_S)
    assert gram.num_tokens == 48


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_the_diagonal_is_the_channel_ablation_of_the_first_pass(name):
    model, ids = tiny_model(name), random_tokens()
    statistics = collect_statistics(model, loaders={"text": [{"input_ids": ids}]}, progress=False).total()
    for gram, sums in zip(grams(model, ids), statistics, strict=True):
        diagonal_C = torch.cat([total(gram, expert).diagonal() for expert in range(NUM_EXPERTS)])
        torch.testing.assert_close(diagonal_C.double(), sums["channel_ablation"], rtol=1e-4, atol=1e-8)
        assert gram.counts == tuple(int(count) for count in sums["count"])


def test_several_passes_give_what_one_gives_and_say_so_before(caplog):
    model, ids = tiny_model("glm4_moe", num_hidden_layers=4), random_tokens()
    with caplog.at_level(logging.INFO):
        one_pass = grams(model, ids)
        three = grams(model, ids, memory_gb=1.5 * LAYER_GB)
    assert "1 pass(es) over the text, layers per pass [3]" in caplog.messages[0]
    assert "3 pass(es) over the text, layers per pass [1, 1, 1]" in caplog.messages[1]
    assert [gram.layer_index for gram in three] == [0, 1, 2]
    for one, other in zip(one_pass, three, strict=True):
        torch.testing.assert_close(one.half_a, other.half_a, rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(one.half_b, other.half_b, rtol=1e-4, atol=1e-8)


def test_a_layer_that_is_larger_than_the_memory_comes_in_parts(caplog):
    """Three experts fit; the last two of a layer share a pass with nobody, for a layer is not split without need."""
    model, ids = tiny_model(), random_tokens()
    with caplog.at_level(logging.INFO):
        parts = grams(model, ids, memory_gb=3.5 * LAYER_GB / NUM_EXPERTS)
    assert "6 pass(es) over the text, layers per pass [1, 1, 1, 1, 1, 1]" in caplog.messages[0]
    assert [part.experts for part in parts] == [(0, 1, 2), (3, 4, 5), (6, 7)] * 2
    assert [part.layer_index for part in parts] == [0, 0, 0, 1, 1, 1]
    whole = grams(model, ids)
    for part in parts:
        one = whole[part.layer_index]
        assert part.counts == one.counts
        for expert in range(NUM_EXPERTS):
            for mine, theirs in ((part.half_a, one.half_a), (part.half_b, one.half_b)):
                here = expert in part.experts
                assert torch.equal(mine[expert], theirs[expert]) if here else mine[expert].shape == (0, 0)


def test_too_little_memory_for_one_expert_is_refused():
    with pytest.raises(ValueError, match=r"at least .* of expert 0 of 'model\.layers\.0.*got 1e-06"):
        grams(tiny_model(), random_tokens(), memory_gb=1e-6)


def test_halves_alternate_in_each_row_and_skip_padding():
    model, ids = tiny_model(), random_tokens(batch=1, length=9)
    (plain, _) = grams(model, ids)
    padded = torch.cat([ids, torch.zeros_like(ids)[:, :4]], dim=1)
    (masked, _) = grams(model, padded, mask=(torch.arange(13) < 9).long().unsqueeze(0))
    torch.testing.assert_close(plain.half_a, masked.half_a, rtol=1e-4, atol=1e-8)
    assert masked.num_tokens == 9
    # Each row begins anew, so neither batches nor processes matter.
    other = random_tokens(batch=1, length=9, seed=1)
    (apart, _), (together, _) = grams(model, ids, other), grams(model, torch.cat([ids, other]))
    torch.testing.assert_close(apart.half_a, together.half_a, rtol=1e-4, atol=1e-8)
    (twice, _) = grams(model, ids, ids)
    torch.testing.assert_close(twice.half_a, tuple(2 * half for half in plain.half_a), rtol=1e-4, atol=1e-8)


def test_only_the_experts_asked_for_take_memory():
    model, ids = tiny_model(), random_tokens()
    (first, second), everything = grams(model, ids, experts=[[3], []]), grams(model, ids)
    torch.testing.assert_close(first.half_a[3], everything[0].half_a[3])
    assert [len(matrix) for matrix in first.half_a] == [0, 0, 0, WIDTH, 0, 0, 0, 0]
    assert first.counts == everything[0].counts
    assert sum(matrix.numel() for matrix in second.half_a) == 0


def test_packed_experts_give_the_grams_of_what_they_hold():
    packed, dense, ids = tiny_model(), tiny_model(), random_tokens()
    for model in (packed, dense):
        convert_experts(model)
        for layer in moe_layers(model):
            pack_experts(layer.experts)
    for layer in moe_layers(dense):
        unpack_experts(layer.experts, dtype=torch.float32)
    for one, other in zip(grams(packed, ids), grams(dense, ids), strict=True):
        torch.testing.assert_close(one.half_b, other.half_b, rtol=1e-4, atol=1e-8)


def test_the_model_is_untouched_between_layers_and_after_an_exception():
    model, ids = tiny_model(), random_tokens()
    model.train()
    iterator = iterate_grams(model, loaders={"text": [{"input_ids": ids}]}, progress=False)
    next(iterator)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    assert "forward" not in vars(moe_layers(model)[0].experts)
    with pytest.raises(ValueError, match="Corpus 'text' has no batch"):
        list(iterate_grams(model, loaders={"text": []}, progress=False))
    assert not any(module._forward_hooks for module in model.modules())
    assert model.training


def test_in_16_bit_too_the_passes_change_nothing():
    """Layers before those of a pass are computed as in any other pass."""
    model, ids = tiny_model("qwen3_moe", dtype=torch.bfloat16), random_tokens(batch=4, length=64)
    convert_experts(model)
    one, three = grams(model, ids), grams(model, ids, memory_gb=1.5 * LAYER_GB)
    for whole, gram in zip(one, three, strict=True):
        assert whole.counts == gram.counts
        for expert in range(NUM_EXPERTS):
            assert torch.equal(total(whole, expert), total(gram, expert))
