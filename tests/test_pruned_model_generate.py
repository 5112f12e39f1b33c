"""A pruned folder, loaded by stock transformers, generates like any model."""

import pytest
import torch
from pruned_models import loaded, logits, pruned_folder
from tiny_models import MODEL_NAMES, random_tokens
from torch import Tensor
from transformers import PreTrainedModel

GREEDY = {"do_sample": False, "max_new_tokens": 10, "eos_token_id": None}
# What transformers says of reference kernels, and of its own way to call generate.
pytestmark = pytest.mark.filterwarnings("ignore:.*falling back.*")


@pytest.fixture(scope="module", params=MODEL_NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module", params=["ragged", "nf4"])
def model(name, request, tmp_path_factory) -> PreTrainedModel:
    return loaded(pruned_folder(tmp_path_factory.mktemp("tiny") / "model", name, packed=request.param == "nf4"))


def greedy(model: PreTrainedModel, ids_BS: Tensor, **settings) -> Tensor:
    return model.generate(ids_BS, **(GREEDY | settings))


def reference(model: PreTrainedModel, ids_BS: Tensor) -> Tensor:
    """Greedy by hand: the whole text again for every token."""
    for _ in range(GREEDY["max_new_tokens"]):
        ids_BS = torch.cat([ids_BS, logits(model, ids_BS)[:, -1:].argmax(-1)], dim=1)
    return ids_BS


def test_greedy_with_every_cache_equals_no_cache(model):
    ids_BS = random_tokens(batch=2, length=9)
    expected = reference(model, ids_BS)
    assert torch.equal(greedy(model, ids_BS), expected)
    assert torch.equal(greedy(model, ids_BS, use_cache=False), expected)
    assert torch.equal(greedy(model, ids_BS, cache_implementation="static"), expected)


def test_left_padding_equals_each_row_alone(model):
    long_1S, short_1S = random_tokens(batch=1, length=9), random_tokens(batch=1, length=5, seed=1)
    padded_1S = torch.nn.functional.pad(short_1S, (4, 0))
    mask_BS = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])
    found = greedy(model, torch.cat([long_1S, padded_1S]), attention_mask=mask_BS)
    assert torch.equal(found[:1], greedy(model, long_1S))
    assert torch.equal(found[1:, 4:], greedy(model, short_1S))


def test_beams_and_samples(model):
    ids_BS = random_tokens(batch=2, length=6)
    beams = greedy(model, ids_BS, num_beams=3, num_return_sequences=2)
    assert torch.equal(beams, greedy(model, ids_BS, num_beams=3, num_return_sequences=2, use_cache=False))
    assert beams.shape == (4, 16)
    draws = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        draws.append(greedy(model, ids_BS, do_sample=True, num_return_sequences=2))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_prompt_lookup_changes_nothing(model, name):
    ids_BS = random_tokens(batch=1, length=6).repeat(1, 2)
    if name == "qwen3_next":  # transformers' own rule for linear attention
        with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
            greedy(model, ids_BS, prompt_lookup_num_tokens=2)
    else:
        assert torch.equal(greedy(model, ids_BS, prompt_lookup_num_tokens=2), greedy(model, ids_BS))
