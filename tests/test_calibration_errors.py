"""What calibration refuses, and what it says."""

import pytest
import torch
from tiny_models import random_tokens, tiny_model

from lightning_moe.calibration.collector import CalibrationCollector, collect_statistics
from lightning_moe.models.discovery import moe_layers


def test_nan_names_layer_corpus_and_batch():
    model, ids = tiny_model(), random_tokens()
    good, bad = {"input_ids": ids}, {"input_ids": torch.full_like(ids, 7)}
    moe_layers(model)[1].router.register_forward_pre_hook(
        lambda _, args: args[0].fill_(float("nan")) if len(poisoned) else None
    )
    poisoned: list[int] = []

    def batches():
        yield good
        poisoned.append(1)
        yield bad

    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts: NaN or infinity in batch 2 of corpus 'code'"):
        collect_statistics(model, loaders={"code": batches()}, progress=False)


def test_an_infinite_layer_output_is_an_error_too():
    model = tiny_model()
    moe_layers(model)[0].experts.down_proj.data[:, 0] = float("inf")
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts: NaN or infinity in batch 1 of corpus 'text'"):
        collect_statistics(model, loaders={"text": [{"input_ids": random_tokens()}]}, progress=False)


def test_a_corpus_without_tokens_is_named():
    model, ids = tiny_model(), random_tokens()
    with pytest.raises(ValueError, match="Corpus 'novels' has no batch"):
        collect_statistics(model, loaders={"novels": []}, progress=False)
    padding = {"input_ids": ids, "attention_mask": torch.zeros_like(ids)}
    with pytest.raises(ValueError, match="Corpus 'novels' has only padding"):
        collect_statistics(model, loaders={"novels": [padding]}, progress=False)
    with pytest.raises(ValueError, match="at least one corpus, got none"):
        collect_statistics(model, loaders={}, progress=False)
    with CalibrationCollector(model) as collector:
        with collector.batch(corpus="novels", attention_mask=padding["attention_mask"]):
            model.get_decoder()(input_ids=ids, use_cache=False)
        with pytest.raises(ValueError, match="Corpus 'novels' has 0 tokens"):
            collector.statistics()


def test_use_outside_the_context_is_refused():
    model, ids = tiny_model(), random_tokens()
    collector = CalibrationCollector(model)
    with pytest.raises(ValueError, match="Calibration saw 0 batches"):
        collector.statistics()
    with pytest.raises(ValueError, match="The collector is not active"), collector.batch(corpus="text"):
        pass
    with collector:
        with pytest.raises(ValueError, match="ran outside a batch"):
            model.get_decoder()(input_ids=ids, use_cache=False)
        with pytest.raises(ValueError, match="Batch 1 of corpus 'text' did not run"), collector.batch(corpus="text"):
            pass
        with pytest.raises(ValueError, match="is still open"), collector.batch(corpus="a"), collector.batch(corpus="b"):
            pass


def test_masks_and_names_that_do_not_fit_are_refused():
    model, ids = tiny_model(), random_tokens()
    with CalibrationCollector(model) as collector:
        mask_4d = torch.ones(2, 1, 16, 16)
        with pytest.raises(ValueError, match=r"must be \[B, S\].*\(2, 1, 16, 16\)"):
            collector.batch(corpus="text", attention_mask=mask_4d).__enter__()
        with pytest.raises(ValueError, match="`corpus` must be a name, got ''"):
            collector.batch(corpus="").__enter__()
        mask = torch.ones(2, 15)
        with (
            pytest.raises(ValueError, match=r"`attention_mask` of shape \(2, 15\) does not fit a batch of 32 tokens"),
            collector.batch(corpus="text", attention_mask=mask),
        ):
            model.get_decoder()(input_ids=ids, use_cache=False)
        with (
            pytest.raises(ValueError, match="ended without a call of its experts"),
            collector.batch(corpus="text"),
        ):
            collector.end_layer(collector.layers[0], torch.zeros(4, 64))


def test_weights_that_are_not_in_memory_are_refused():
    model = tiny_model()
    moe_layers(model)[1].experts.to("meta")
    with (
        pytest.raises(ValueError, match=r"'model\.layers\.1\.mlp\.experts' is on the meta device"),
        CalibrationCollector(model),
    ):
        pass
    assert model.training is False
    assert "forward" not in vars(moe_layers(model)[0].experts)


def test_adapters_around_the_experts_are_refused():
    model = tiny_model()
    layer = moe_layers(model)[0]
    layer.block.experts = torch.nn.Sequential(layer.experts)
    with (
        pytest.raises(
            ValueError, match=r"layers\.0\.mlp\.experts' is a Sequential, not .*Merge or remove other adapters"
        ),
        CalibrationCollector(model),
    ):
        pass
