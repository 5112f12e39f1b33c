"""Sliding windows: every token once, from enough before it, as a loop over tokens has it."""

import pytest
import torch
from tiny_models import VOCAB_SIZE, tiny_model
from tiny_runs import save_model, save_text, text_module

from lightning_moe.commands.evaluation import sliding
from lightning_moe.evaluation.perplexity import evaluate_model
from lightning_moe.evaluation.windows import SlidingWindows
from lightning_moe.models.loading import load_model
from lightning_moe.training.corpora import Corpus


def text_of(length, *, seed=0):
    return torch.randint(3, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(seed))


def naive_losses(model, token_T, *, context, stride):
    """Token by token: as many tokens before each as the window that is the first to reach it holds."""
    losses = []
    for index in range(1, len(token_T)):
        end = context
        while end <= index:  # the window that ends behind this token
            end += stride
        begin = max(0, min(end, len(token_T)) - context)
        with torch.no_grad():
            logits_V = model(token_T[None, begin:index]).logits[0, -1]
        losses.append(-logits_V.log_softmax(-1)[token_T[index]].item())
    return losses


@pytest.mark.parametrize(
    ("length", "context", "stride"), [(40, 16, 8), (41, 16, 5), (16, 16, 8), (9, 16, 3), (30, 8, 7), (20, 6, 1)]
)
def test_loss_is_that_of_a_loop_over_tokens(length, context, stride):
    model, token_T = tiny_model(), text_of(length)
    windows = SlidingWindows(token_T, context=context, stride=stride, batch_size=3)
    result = evaluate_model(model, loaders={"one": windows})
    expected = naive_losses(model, token_T, context=context, stride=stride)
    assert result.num_tokens == len(expected) == length - 1
    assert result.nll == pytest.approx(sum(expected) / len(expected), rel=1e-5)


@pytest.mark.parametrize(("length", "context", "stride"), [(100, 16, 4), (57, 10, 9), (33, 32, 31), (5, 8, 2)])
def test_every_token_once_with_enough_before_it(length, context, stride):
    windows = SlidingWindows(torch.arange(length), context=context, stride=stride, batch_size=4)
    seen = []
    for batch in windows:
        assert batch["input_ids"].shape == batch["labels"].shape
        for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
            places = [place for place in range(1, len(ids)) if labels[place] != -100]
            assert all(ids[place] == labels[place] for place in places)
            assert all(place >= min(context - stride, ids[place]) for place in places)
            seen += [ids[place] for place in places]
    assert seen == list(range(1, length))
    assert len(list(windows)) == len(windows)


def test_a_smaller_stride_gives_more_context():
    windows = [SlidingWindows(text_of(64), context=16, stride=stride, batch_size=2) for stride in (2, 15)]
    before = [sum(place - begin for begin, first, end in w.spans() for place in range(first, end)) for w in windows]
    assert before[0] > before[1]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"context": 8, "stride": 0}, "`stride` must be from 1 to 7, one less than the 8 tokens of a window, got 0"),
        ({"context": 8, "stride": 8}, "got 8. Leave it out for windows that do not overlap"),
        ({"context": 8, "stride": 2, "batch_size": 0}, "`batch_size` must be at least 1, got 0"),
    ],
)
def test_sizes_are_checked(settings, match):
    with pytest.raises(ValueError, match=match):
        SlidingWindows(text_of(20), **({"batch_size": 1} | settings))


def test_the_data_modules_text_without_its_padding(tmp_path):
    save_text(tmp_path)
    model = load_model(save_model(tmp_path / "model"))
    data = text_module(tmp_path)
    loaders = sliding(data, stride=24)
    for name, rows in data.rows("validation").items():
        tokens = [
            int(token) for row, length in zip(rows.input_ids_NS, rows.length_N, strict=True) for token in row[:length]
        ]
        assert loaders[name].token_T.tolist() == tokens
        assert len(tokens) == rows.num_tokens
        assert len(tokens) % 32 != 0  # the last row is padded
    result = evaluate_model(model, loaders=loaders)
    assert result.num_tokens == sum(rows.num_tokens - 1 for rows in data.rows("validation").values())


def test_examples_have_no_running_text(tmp_path):
    save_text(tmp_path)
    (tmp_path / "c.jsonl").write_text('{"instruction": "Say hello.", "input": "", "output": "Hello."}\n' * 3)
    corpus = Corpus(source=str(tmp_path / "c.jsonl"), format="instruction")
    with pytest.raises(ValueError, match="`stride` slides over running text, and the corpus 'c' holds examples"):
        sliding(text_module(tmp_path, validation={"c": corpus}, sequence_length=64), stride=8)
