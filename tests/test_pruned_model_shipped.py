"""The shipped model, pruned: generation with its tokenizer, and `pipeline` from its folder."""

import pytest
import torch
from pruned_models import SHIPPED, loaded, logits, pruned_folder
from tiny_models import random_tokens
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, TextStreamer, pipeline

from lightning_moe.models.channel_experts import ChannelExperts
from lightning_moe.models.loading import load_model

GREEDY = {"do_sample": False, "max_new_tokens": 10, "eos_token_id": None}


@pytest.fixture(scope="module", params=["ragged", "nf4"])
def shipped(request, tmp_path_factory) -> str:
    return pruned_folder(tmp_path_factory.mktemp("shipped") / "model", SHIPPED, packed=request.param == "nf4")


def greedy(model: PreTrainedModel, ids_BS: Tensor, **settings) -> Tensor:
    return model.generate(ids_BS, **(GREEDY | settings))


def test_pipeline_with_one_text_a_batch_and_a_conversation(shipped):
    generator = pipeline("text-generation", model=shipped)
    texts = ["def add(a, b):", "Once upon a time there was"]
    alone = [generator(text, **GREEDY)[0]["generated_text"] for text in texts]
    assert [rows[0]["generated_text"] for rows in generator(texts, batch_size=2, **GREEDY)] == alone
    assert all(found.startswith(text) for found, text in zip(alone, texts, strict=True))
    ids_1S = generator.tokenizer(texts[0], return_tensors="pt").input_ids
    assert alone[0] == generator.tokenizer.decode(greedy(loaded(shipped), ids_1S)[0])
    question = {"role": "user", "content": "Hello"}
    (answer,) = generator([question], **GREEDY)
    assert answer["generated_text"][0] == question
    prompt = generator.tokenizer.apply_chat_template([question], add_generation_prompt=True, tokenize=False)
    assert (
        answer["generated_text"][1]["content"]
        == generator(prompt, return_full_text=False, **GREEDY)[0]["generated_text"]
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"device_map": "auto"},
        {"device_map": "cpu"},
        {"device": "cpu"},
        {"dtype": torch.bfloat16},
        {"dtype": "float16"},
        {"dtype": "auto"},
        {"model_kwargs": {"low_cpu_mem_usage": True, "attn_implementation": "eager"}},
    ],
    ids=str,
)
def test_the_arguments_of_pipeline(shipped, settings):
    generator = pipeline("text-generation", model=shipped, **settings)
    expected = {torch.bfloat16: torch.bfloat16, "float16": torch.float16}.get(settings.get("dtype"), torch.float32)
    assert generator.model.dtype == expected
    assert generator.model.device.type == "cpu"
    packed = [module.packed for module in generator.model.modules() if isinstance(module, ChannelExperts)]
    assert len(packed) == 6
    assert len(generator("Once upon", **GREEDY)[0]["generated_text"]) > len("Once upon")


def test_a_folder_partly_on_the_cpu_or_the_disk_is_refused_and_says_why(shipped):
    device_map = {"model": "cpu", "lm_head": "disk"}
    with pytest.raises(ValueError, match=r"cannot lie partly on the CPU or the disk, got devices \['cpu', 'disk'\]"):
        loaded(shipped, device_map=device_map)
    whole = loaded(shipped, device_map={"model": "cpu", "lm_head": "cpu"})
    ids_BS = random_tokens()
    assert torch.equal(logits(whole, ids_BS), logits(loaded(shipped), ids_BS))


def test_one_token_touches_only_the_rows_of_its_experts(shipped, monkeypatch):
    """Decoding goes through row slices: what is loaded is what the token's experts have, layer by layer."""
    model, rows = loaded(shipped), 0
    layers = [module for module in model.modules() if isinstance(module, ChannelExperts)]
    original = type(layers[0].projection("gate_proj")).blocks

    def counted(self, sizes):
        def count(loader):
            def load(start, stop, dtype):
                nonlocal rows
                rows += stop - start
                return loader(start, stop, dtype)

            return load

        return [count(loader) for loader in original(self, sizes)]

    chosen: list[int] = []
    for layer in layers:
        layer.register_forward_pre_hook(
            lambda module, inputs: chosen.append(sum(module.widths[expert] for expert in inputs[1].unique().tolist()))
        )
    monkeypatch.setattr(type(layers[0].projection("gate_proj")), "blocks", counted)
    one, many = torch.tensor([[7]]), random_tokens(batch=1, length=64)
    logits(model, one)
    assert rows == 3 * sum(chosen)
    assert len(chosen) == 6
    total, rows = rows, 0
    logits(model, many)
    assert total < rows / 2


def test_four_hundred_tokens_are_those_of_the_whole_text(shipped):
    model, tokenizer = loaded(shipped), AutoTokenizer.from_pretrained(shipped)
    ids_1S = tokenizer("Once upon a time", return_tensors="pt").input_ids
    found_1S = greedy(model, ids_1S, max_new_tokens=400)
    assert found_1S.shape == (1, ids_1S.shape[1] + 400)
    again_1S = logits(model, found_1S[:, :-1])[:, ids_1S.shape[1] - 1 :].argmax(-1)
    assert torch.equal(found_1S[:, ids_1S.shape[1] :], again_1S)


def test_a_streamer_prints_what_is_generated(shipped, capsys):
    model, tokenizer = loaded(shipped), AutoTokenizer.from_pretrained(shipped)
    ids_1S = tokenizer("Once upon a time", return_tensors="pt").input_ids
    found_1S = greedy(model, ids_1S, streamer=TextStreamer(tokenizer))
    assert capsys.readouterr().out.strip() == tokenizer.decode(found_1S[0]).strip()


def test_the_pruned_model_drafts_for_the_dense_one(shipped):
    dense, pruned = load_model(SHIPPED, dtype="float32"), loaded(shipped)
    ids_1S = random_tokens(batch=1, length=8)
    assert torch.equal(greedy(dense, ids_1S, assistant_model=pruned), greedy(dense, ids_1S))
    assert torch.equal(greedy(pruned, ids_1S, assistant_model=dense), greedy(pruned, ids_1S))
