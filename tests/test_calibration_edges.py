"""Corners of the calibration's sums: outputs of zero and of infinity, gates in float64, padding of any kind."""

import pytest
import torch
from tiny_models import random_tokens, tiny_model
from torch.nn import functional

from lightning_moe.calibration.collector import collect_statistics
from lightning_moe.calibration.gradients import collect_gradients
from lightning_moe.calibration.gram import iterate_grams
from lightning_moe.calibration.observer import replaced_forward
from lightning_moe.calibration.routed import RoutedPairs, inverse_energy
from lightning_moe.models.discovery import moe_layers


def test_an_output_of_zero_has_a_finite_inverse():
    # 1 / (0 + 1e-6) with a scale of 1, 0.25 / 1e-6 with one of a half; 1 / (4 + 1e-6) for a norm of 2
    output_TH = torch.tensor([[0.0, 0.0], [2.0, 0.0]], dtype=torch.float64)
    inverse_T, energy_T = inverse_energy(output_TH, scale=1.0)
    assert inverse_T.tolist() == pytest.approx([1e6, 1 / 4.000001], rel=1e-12)
    assert energy_T.tolist() == [0.0, 4.0]
    assert inverse_energy(output_TH, scale=0.5)[0][0].item() == pytest.approx(0.25e6, rel=1e-12)


def test_gates_in_float64_keep_their_digits():
    weights_TK = torch.tensor([[1 / 3, 2 / 3], [0.1, 0.9]], dtype=torch.float64)
    pairs = RoutedPairs.sort(
        torch.tensor([[1, 0], [0, 1]]),
        weights_TK,
        class_T=torch.tensor([0, 0]),
        num_classes=2,
        num_experts=2,
        dtype=torch.float64,
    )
    assert pairs.gate_S.tolist() == [2 / 3, 0.1, 1 / 3, 0.9]


def test_an_infinite_output_is_no_layer_without_effect():
    # The relative error of such a token would be 0: divided by infinity.
    model = tiny_model()

    def overflow(module, args, output):
        hidden_BSH = (output[0] if isinstance(output, tuple) else output).clone()
        hidden_BSH[0, 3, 5] = torch.inf
        return hidden_BSH

    moe_layers(model)[-1].decoder_layer.register_forward_hook(overflow)
    with pytest.raises(ValueError, match=r"layers\.1\..*: NaN or infinity in batch 1 of corpus 'text'"):
        collect_statistics(model, loaders={"text": [{"input_ids": random_tokens()}]}, progress=False)


@pytest.mark.parametrize("padding", [(3, 0), (0, 3), (3, 2)])
def test_halves_of_a_gram_do_not_see_padding_on_any_side(padding):
    model, ids_BS = tiny_model(dtype=torch.float64), random_tokens(batch=2, length=9)
    mask_BS = functional.pad(torch.ones_like(ids_BS), padding)
    padded = {"input_ids": functional.pad(ids_BS, padding, value=7), "attention_mask": mask_BS}
    plain, masked = (
        list(iterate_grams(model, loaders={"text": [inputs]}, progress=False))
        for inputs in ({"input_ids": ids_BS}, padded)
    )
    for one, other in zip(plain, masked, strict=True):
        assert (other.num_tokens, other.counts) == (18, one.counts)
        # Norms compute in float32 even here.
        torch.testing.assert_close(other.half_a, one.half_a, rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(other.half_b, one.half_b, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("padding", [(3, 0), (0, 3)])
def test_what_stands_under_the_padding_has_no_gradient(padding):
    # Any token, not only the one whose embedding is zero: it predicts nothing, and nothing predicts it.
    model, ids_BS = tiny_model(dtype=torch.float64), random_tokens(batch=2, length=12)
    mask_BS = functional.pad(torch.ones_like(ids_BS), padding)
    padded = {"input_ids": functional.pad(ids_BS, padding, value=7), "attention_mask": mask_BS}
    plain, masked = (
        collect_gradients(model, loaders={"text": [inputs]}, progress=False)["text"]
        for inputs in ({"input_ids": ids_BS}, padded)
    )
    for one, other in zip(plain, masked, strict=True):
        torch.testing.assert_close(other["loss_snip"], one["loss_snip"], rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(other["loss_taylor"], one["loss_taylor"], rtol=1e-5, atol=1e-8)


def test_squares_that_overflow_are_refused_though_all_activations_are_finite():
    # h is near 1e20 and W_down h near 1: only the Gram of h is infinite.
    model = tiny_model()
    for layer in moe_layers(model):
        layer.experts.gate_up_proj.data *= 1e11
        layer.experts.down_proj.data *= 1e-22
    loaders = {"text": [{"input_ids": random_tokens()}]}
    assert bool(model(**loaders["text"][0]).logits.isfinite().all())
    with pytest.raises(ValueError, match="NaN or infinity in the activations that its down projections are refitted"):
        list(iterate_grams(model, loaders=loaders, progress=False))


def test_a_forward_that_somebody_else_put_there_comes_back():
    module = torch.nn.Linear(2, 2)
    theirs = module.forward = lambda value: value + 1
    with replaced_forward(module, lambda value: value * 10):
        assert module(torch.tensor(3)).item() == 30
    assert vars(module)["forward"] is theirs
    assert module(torch.tensor(3)).item() == 4
