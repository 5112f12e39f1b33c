"""Layers are recomputed by the name that the installed transformers has for it, without its warning."""

import warnings

import pytest
import transformers
from tiny_models import random_tokens, tiny_model

from lightning_moe.training.recomputation import recompute_layers


def num_calls(model):
    """How often the first decoder layer's experts run in a forward and a backward."""
    calls = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    tokens = random_tokens(batch=1, length=8, seed=0)
    model.train()(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    return len(calls)


def test_no_library_is_asked_by_an_old_name():
    model = tiny_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # FutureWarning too, which other tests leave aside
        recompute_layers(model)
    assert (num_calls(model), num_calls(tiny_model())) == (2, 1)


class Old:
    """A model of a transformers that knows the old name alone."""

    def __init__(self):
        self.asked = []

    def gradient_checkpointing_enable(self, settings):
        self.asked.append(settings)


@pytest.mark.parametrize("version", ["5.21.0", "5.22.4"])
def test_older_versions_are_asked_by_their_name(version, monkeypatch):
    monkeypatch.setattr(transformers, "__version__", version)
    model = Old()
    recompute_layers(model)
    assert model.asked == [{"use_reentrant": False}]
