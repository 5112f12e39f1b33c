"""KL and top-1 agreement with the dense model against a loop over tokens, and models without experts."""

import math

import pytest
import torch
from test_evaluation import padded_batches
from tiny_models import FAMILY_NAMES, tiny_model
from tiny_runs import save_text, text_module, token_batches
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_moe.evaluation.agreement import DenseReference, divergence
from lightning_moe.evaluation.perplexity import evaluate_model
from lightning_moe.evaluation.stages import evaluate_stage
from lightning_moe.models.loading import load_model


def naive_agreement(dense, model, batches):
    """Token by token, in double precision."""
    divergences, same = [], []
    for batch in batches:
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        with torch.no_grad():
            p_BSV, q_BSV = (one(**inputs).logits.double().log_softmax(-1) for one in (dense, model))
        for row, place in zip(*torch.nonzero(batch["labels"][:, 1:] != -100, as_tuple=True), strict=True):
            p_V, q_V = p_BSV[row, place], q_BSV[row, place]
            divergences.append(sum(float(p.exp() * (p - q)) for p, q in zip(p_V, q_V, strict=True)))
            same.append(bool(p_V.argmax() == q_V.argmax()))
    return sum(divergences) / len(divergences), sum(same) / len(same)


@pytest.mark.parametrize("name", ["qwen3_moe", "granitemoe"])
def test_agreement_is_that_of_a_loop_over_tokens(name):
    dense, model = tiny_model(name), tiny_model(name)
    with torch.no_grad():
        model.lm_head.weight.add_(0.02 * torch.randn(model.lm_head.weight.shape, generator=torch.manual_seed(0)))
    loaders = {"one": padded_batches(), "two": token_batches(1, seed=1)}
    result = evaluate_model(model, loaders=loaders, reference=DenseReference.measure(dense, loaders=loaders))
    for corpus, batches in loaders.items():
        kl, same = naive_agreement(dense, model, batches)
        assert result.kl_per_corpus[corpus] == pytest.approx(kl, rel=1e-3)
        assert result.agreement_per_corpus[corpus] == pytest.approx(same)
    assert result.kl == pytest.approx(sum(result.kl_per_corpus.values()) / 2)
    assert 0 < result.agreement < 1
    assert result.nll == evaluate_model(model, loaders=loaders).nll


def test_divergence_by_hand():
    dense, model = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.25, 0.5, 0.25]]).log()
    kl_N, same_N = divergence(model, dense)
    # 0.5 log 2 + 0.25 log 0.5 + 0 = 0.25 log 2.
    assert kl_N.item() == pytest.approx(0.25 * math.log(2))
    assert not same_N.item()


@pytest.mark.parametrize("name", FAMILY_NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dense_model_agrees_with_itself(name, dtype):
    model, loaders = tiny_model(name, dtype=dtype), {"one": padded_batches()}
    result = evaluate_model(model, loaders=loaders, reference=DenseReference.measure(model, loaders=loaders))
    assert result.kl == pytest.approx(0, abs=1e-4 if dtype == torch.bfloat16 else 1e-6)
    assert result.agreement == pytest.approx(1, abs=0.05 if dtype == torch.bfloat16 else 0)


def test_the_reference_outlives_the_model_and_many_tokens():
    dense = tiny_model()
    ids = torch.randint(3, 128, (40, 16), generator=torch.Generator().manual_seed(3))
    loaders = {"one": [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}]}  # 600 predictions
    reference = DenseReference.measure(dense, loaders=loaders)
    assert not dense.lm_head._forward_pre_hooks
    with torch.no_grad():
        dense.lm_head.weight.zero_()
    result = evaluate_model(tiny_model(), loaders=loaders, reference=reference)
    assert result.kl == pytest.approx(0, abs=1e-6)
    # A model without a preference: KL is the entropy that is missing.
    uniform = evaluate_model(dense, loaders=loaders, reference=reference)
    with torch.no_grad():
        logprobs = tiny_model()(ids).logits[:, :-1].log_softmax(-1)
    assert uniform.kl == pytest.approx(math.log(128) + float((logprobs.exp() * logprobs).sum(-1).mean()), rel=1e-4)


def test_without_a_reference_there_is_no_agreement():
    result = evaluate_model(tiny_model(), loaders={"one": token_batches(1)})
    assert (result.kl, result.agreement) == (None, None)
    assert result.kl_per_corpus == result.agreement_per_corpus == {}


def test_other_text_and_other_vocabularies_are_refused():
    dense, loaders = tiny_model(), {"one": token_batches(2)}
    reference = DenseReference.measure(dense, loaders=loaders)
    with pytest.raises(ValueError, match=r"The dense model was run on the corpora \['one'\], not on 'two'"):
        evaluate_model(dense, loaders={"two": token_batches(1)}, reference=reference)
    for other in (token_batches(2, seed=1), token_batches(3)):
        with pytest.raises(ValueError, match="The dense model saw other batches of corpus 'one'"):
            evaluate_model(dense, loaders={"one": other}, reference=reference)
    with pytest.raises(ValueError, match="The dense model has 128 tokens and this one 256"):
        evaluate_model(tiny_model(vocab_size=256), loaders=loaders, reference=reference)


def test_logits_that_are_not_the_heads():
    model = tiny_model()

    def square(_module, _args, output):
        output.logits = output.logits.square()

    model.register_forward_hook(square)
    with pytest.raises(ValueError, match="The logits of this model are not its head's output times a constant"):
        DenseReference.measure(model, loaders={"one": token_batches(1)})
    assert not model.lm_head._forward_pre_hooks


def test_a_refused_family_is_not_evaluated_either(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt_oss"}')
    with pytest.raises(ValueError, match="Model type 'gpt_oss' is not supported"):
        load_model(str(tmp_path), any_family=True)


def test_a_model_without_experts_has_a_row(tmp_path):
    config = LlamaConfig(
        vocab_size=4096, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "model")
    loaders = text_module(save_text(tmp_path)).validation_dataloaders()
    reference = DenseReference.measure(model.eval(), loaders=loaders)
    row = evaluate_stage("llama", folder=tmp_path / "model", loaders=loaders, seconds=0.0, reference=reference)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert row["stored_params"] == row["active_params"] == num_parameters
    assert row["prune_ratio"] == 0.0
    assert row["kl"] == pytest.approx(0, abs=1e-6)
    assert row["top1_agreement"] == pytest.approx(1)
