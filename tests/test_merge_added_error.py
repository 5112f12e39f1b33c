"""What packing a merged model adds: weights module by module, and the model's output.  C channels, H hidden."""

import copy

import pytest
import torch
from dora_reference import shake
from pruned_models import cut_model, logits
from tiny_models import FAMILY_NAMES, random_tokens
from torch.nn import functional

from lightning_moe.adapters.inject import AdapterConfig, inject_adapters
from lightning_moe.adapters.merge import merge_adapters
from lightning_moe.export.deploy import export_model
from lightning_moe.models.channel_experts import ChannelExperts
from lightning_moe.models.discovery import moe_layers
from lightning_moe.quantization.added_error import AddedError, quantize_measured
from lightning_moe.quantization.linears import dense_weight, quantize_model
from lightning_moe.quantization.rounding import BLOCK_SIZE

IDS = random_tokens(batch=3, length=20)
pytestmark = pytest.mark.filterwarnings("ignore:.*falling back.*")


def adapted_model(name="qwen3_moe", *, packed=True, scale=0.05, dtype=torch.float32):
    model = cut_model(name, packed=packed).to(dtype)
    peft_model = inject_adapters(model, config=AdapterConfig(expert_rank=2, router_rank=2))
    shake(peft_model, scale=scale)
    return peft_model


def copies(**settings):
    """The same merged model, twice."""
    merged = merge_adapters(adapted_model(**settings), dtype=torch.float32)
    return merged, copy.deepcopy(merged)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_every_number_is_that_of_the_two_models(name):
    merged, packed = copies(name=name)
    error = quantize_measured(packed, ids_BS=IDS)
    before, after = logits(merged, IDS).double(), logits(packed, IDS).double()
    expected_kl = functional.kl_div(after.log_softmax(-1), before.log_softmax(-1), log_target=True, reduction="none")
    assert error.kl == pytest.approx(float(expected_kl.sum(-1).mean()), rel=1e-3)
    assert error.kl > 0
    assert error.max_logit_diff == pytest.approx(float((before - after).abs().max()), rel=1e-4)
    assert (error.num_tokens, error.random_text) == (60, False)
    for mine, theirs in zip(moe_layers(packed), moe_layers(merged), strict=True):
        exact, rounded = (
            torch.cat([part for e in range(one.num_experts) for part in one.expert_matrices(e, dtype=torch.float32)])
            for one in (theirs.experts, mine.experts)
        )
        assert error.weights[mine.name] == pytest.approx(
            float((exact - rounded).detach().norm() / exact.detach().norm()), rel=1e-4
        )
        assert 0.07 < error.weights[mine.name] < 0.11  # NF4 with 8-bit absmax: 0.09 on normal numbers
    linears = set(error.weights) - {layer.name for layer in moe_layers(packed)}
    assert linears == {name for name, module in packed.named_modules() if type(module).__name__ == "Linear4bit"}
    for linear in linears:
        exact, rounded = (dense_weight(one.get_submodule(linear)).detach() for one in (merged, packed))
        assert error.weights[linear] == pytest.approx(float((exact - rounded).norm() / exact.norm()), rel=1e-4)


def test_it_packs_as_quantize_model_does():
    measured, plain = copies()
    quantize_measured(measured)
    quantize_model(plain)
    assert torch.equal(logits(measured, IDS), logits(plain, IDS))
    assert {name: value.dtype for name, value in measured.state_dict().items()} == {
        name: value.dtype for name, value in plain.state_dict().items()
    }
    assert not any(parameter.requires_grad for parameter in measured.parameters())


def test_rows_that_4_bit_holds_already_add_nothing():
    """Adapters that learned nothing: what is merged are the packed rows themselves."""
    merged = merge_adapters(adapted_model(scale=0.0), dtype=torch.float32)
    error = quantize_measured(merged, ids_BS=IDS)
    assert max(error.weights[layer.name] for layer in moe_layers(merged)) < 1e-5
    again = quantize_measured(merged)
    assert (again.weights, again.kl, again.max_logit_diff) == ({}, 0, 0)
    assert again.describe() == "4 bit adds nothing: everything was packed already"


def test_a_hand_calculation():
    """Logits (0, ln 3) against (0, 0): p = (1/4, 3/4), q = (1/2, 1/2); KL = ln 2 - H(p) = 0.6931 - 0.5623 = 0.1308."""
    before, after = torch.tensor([[[0.0, 1.0986123]]]), torch.zeros(1, 1, 2)
    error = AddedError.of({"a": 0.1, "b": 0.2}, before_BSV=before, after_BSV=after, random_text=True)
    assert error.kl == pytest.approx(0.1308, abs=1e-4)
    assert error.max_logit_diff == pytest.approx(1.0986, abs=1e-4)
    assert error.describe() == (
        "4 bit adds a relative weight error of 0.1500 on average (0.2000 in b), KL 0.13 nats a token and at most 1.1 "
        "in a logit (1 random tokens)"
    )


def test_a_model_that_cannot_be_packed_stays_as_it_is():
    model = cut_model("qwen3_moe")
    model.config.hidden_size = BLOCK_SIZE + 8
    with pytest.raises(ValueError, match="multiple of 64, got 72"):
        quantize_measured(model)
    assert not any(isinstance(module, ChannelExperts) and module.packed for module in model.modules())


@pytest.mark.parametrize("packed", [False, True])
def test_the_export_says_it_and_keeps_it(packed, tmp_path):
    peft_model = adapted_model(packed=packed)
    model = peft_model.get_base_model()
    plain, merged = export_model(model, folder=tmp_path, formats=["merged", "merged_nf4"], peft_model=peft_model)
    assert plain.added_error is None
    record = merged.to_dict()["added_error"]
    assert set(record) == {"weights", "kl", "max_logit_diff", "num_tokens", "random_text"}
    assert record["num_tokens"] == 64
    assert 0.07 < record["weights"]["model.layers.0.mlp.experts"] < 0.11
    assert "4 bit adds a relative weight error of 0.0" in merged.describe()
    assert "4 bit adds" not in plain.describe()
