"""A pruned model as a module: copies, types, state dicts, pickles, shards, sizes, new embeddings."""

import copy
import os
import pickle
from pathlib import Path

import pytest
import torch
from pruned_models import SHIPPED, loaded, logits, pruned_folder, put_logits
from tiny_models import random_tokens
from transformers import PreTrainedModel

from lightning_moe.models.channel_experts import ChannelExperts
from lightning_moe.models.discovery import model_shape
from lightning_moe.quantization.footprint import measure_footprint

IDS = random_tokens()


@pytest.fixture(scope="module", params=["qwen3_moe", "deepseek_v2_grouped", SHIPPED])
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module", params=["ragged", "nf4"])
def folder(name, request, tmp_path_factory) -> str:
    return pruned_folder(tmp_path_factory.mktemp("tiny") / "model", name, packed=request.param == "nf4")


@pytest.fixture
def model(folder) -> PreTrainedModel:
    return loaded(folder)


def is_packed(model: PreTrainedModel) -> bool:
    return any(isinstance(module, ChannelExperts) and module.packed for module in model.modules())


def test_a_copy_is_equal_and_independent(model):
    before, twin = logits(model, IDS), copy.deepcopy(model)
    assert torch.equal(logits(twin, IDS), before)
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert torch.equal(logits(model, IDS), before)


def test_a_pickle_as_spawned_workers_get_it(model):
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(again, IDS), logits(model, IDS))
    assert model_shape(again) == model_shape(model)


@pytest.mark.slow
def test_a_spawned_worker_computes_the_same(model):
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    worker = context.Process(target=put_logits, args=(results, model, IDS))
    worker.start()
    found = torch.from_numpy(results.get())
    worker.join()
    torch.testing.assert_close(found, logits(model, IDS), rtol=1e-5, atol=1e-5)


def test_a_state_dict_through_a_file_that_holds_tensors_only(model, folder, tmp_path):
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = loaded(folder)
    for parameter in other.parameters():
        parameter.data.zero_()
    report = other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert (report.missing_keys, report.unexpected_keys) == ([], [])
    assert torch.equal(logits(other, IDS), logits(model, IDS))


def test_shards(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert torch.equal(logits(loaded(str(tmp_path)), IDS), logits(model, IDS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_other_types(model, folder, dtype):
    expected, asked = logits(model, IDS), loaded(folder, dtype=dtype)
    if is_packed(model):
        with pytest.raises(ValueError, match=r"`.half\(\)` is not supported for quantized model"):
            model.half()
    moved = model.to(dtype).to("cpu")
    assert moved.dtype == asked.dtype == dtype
    kept = dict(asked.named_buffers())
    for buffer_name, value in moved.named_buffers():
        value.data = kept[buffer_name]  # `.to` rounds the rotary frequencies of every transformers model
    assert torch.equal(logits(moved, IDS), logits(asked, IDS))
    assert (logits(moved, IDS).float() - expected).abs().median() < 0.02 * expected.abs().max()


def test_sizes_are_those_of_the_tensors(model, folder, name):
    distinct = {value.data_ptr(): value for value in [*model.parameters(), *model.buffers()]}.values()
    assert model.get_memory_footprint() == sum(value.nbytes for value in distinct)
    stored = sum(os.path.getsize(file) for file in Path(folder).glob("*.safetensors"))
    if name == SHIPPED:  # the tiny ones are headers, in good part
        assert stored == pytest.approx(model.get_memory_footprint(), rel=0.03)
    if not is_packed(model):
        assert model.num_parameters() == measure_footprint(model).stored_params
    else:  # transformers knows of packed Linear layers, not of our packed rows
        assert model.num_parameters() < measure_footprint(model).stored_params


@pytest.mark.filterwarnings("ignore:.*new embeddings will be initialized.*")
def test_more_tokens(model, tmp_path):
    size = model.config.vocab_size
    expected = logits(model, IDS)
    model.resize_token_embeddings(size + 3, mean_resizing=False)
    assert torch.equal(logits(model, IDS)[..., :size], expected)
    model.save_pretrained(tmp_path)
    again = loaded(str(tmp_path))
    assert again.config.vocab_size == size + 3
    assert torch.equal(logits(again, IDS), logits(model, IDS))


def test_modes_reach_the_experts(model):
    experts = [module for module in model.modules() if isinstance(module, ChannelExperts)]
    assert not model.training
    assert all(module.training for module in experts) is False
    model.train()
    assert all(module.training for module in experts)
