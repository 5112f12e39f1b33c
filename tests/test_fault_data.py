"""Loaders that raise, batches that cannot be run, text too short or of another tokenizer."""

import logging

import pytest
import torch
from cli_runs import run, save_job
from text_data import write_jsonl
from tiny_models import VOCAB_SIZE, random_tokens, tiny_model
from tiny_runs import quiet_trainer, save_text, text_module
from torch.utils.data import DataLoader, Dataset

from lightning_moe.calibration.collector import collect_statistics
from lightning_moe.calibration.gradients import collect_gradients
from lightning_moe.calibration.gram import iterate_grams
from lightning_moe.calibration.text import CalibrationText
from lightning_moe.cli import one_line
from lightning_moe.models.discovery import moe_layers
from lightning_moe.training.corpora import Corpus
from lightning_moe.training.module import LanguageModelModule

pytestmark = pytest.mark.fault

PASSES = {
    "calibrate": lambda model, loaders: collect_statistics(model, loaders=loaders, progress=False),
    "repair": lambda model, loaders: list(iterate_grams(model, loaders=loaders, progress=False)),
    "gradients": lambda model, loaders: collect_gradients(model, loaders=loaders, progress=False),
}


class Rows(Dataset):
    """Eight rows, of which the sixth cannot be read."""

    def __init__(self, error=None):
        self.error = error

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == 5 and self.error is not None:
            raise self.error
        return {"input_ids": random_tokens(batch=1, length=8, seed=index)[0]}


def is_untouched(model):
    layers = moe_layers(model)
    return not any(
        "forward" in vars(layer.experts) or layer.router._forward_hooks or layer.decoder_layer._forward_hooks
        for layer in layers
    )


@pytest.mark.parametrize("error", [RuntimeError("row 5 is broken"), KeyError("row 5 is broken"), OSError("row 5")])
@pytest.mark.parametrize("name", PASSES)
def test_a_loader_that_raises_leaves_the_model_as_it_was(name, error):
    model, good = tiny_model(), {"a": DataLoader(Rows(), batch_size=2)}
    model.train()
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(type(error), match="row 5"):
        PASSES[name](model, {"a": DataLoader(Rows(error), batch_size=2)})
    assert is_untouched(model)
    assert model.training
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    again, fresh = PASSES[name](model, good), PASSES[name](tiny_model(), good)
    if name == "calibrate":
        assert again.digest == fresh.digest


def test_a_worker_that_raises_is_one_line():
    loader = DataLoader(Rows(ValueError("Row 5 is damaged.\nWrite it again.")), batch_size=2, num_workers=1)
    model = tiny_model()
    with pytest.raises(ValueError, match="Row 5 is damaged") as caught:
        collect_statistics(model, loaders={"a": loader}, progress=False)
    assert is_untouched(model)
    assert "Traceback" in str(caught.value)  # that of the worker, which the command line leaves out
    assert one_line(caught.value) == "In a worker process of a data loader: Row 5 is damaged. Write it again."


IDS = random_tokens(batch=3, length=8)


@pytest.mark.parametrize(
    ("batch", "match"),
    [
        (
            {"input_ids": IDS + VOCAB_SIZE},
            r"'a' has token \d+, and the model knows 0 to 127\. Tokenise with the mod",
        ),
        ({"input_ids": IDS - VOCAB_SIZE}, r"'a' has token -\d+, and the model knows 0 to 127"),
        ({"input_ids": IDS[0]}, r"must have `input_ids`, whole numbers \[B, S\], got \(8,\) of torch.int64"),
        ({"input_ids": IDS.float()}, r"whole numbers \[B, S\], got \(3, 8\) of torch.float32"),
        ({"input_ids": IDS.tolist()}, r"whole numbers \[B, S\], got \['input_ids'\]"),
        ({"tokens": IDS}, r"whole numbers \[B, S\], got \['tokens'\]"),
        (IDS, r"whole numbers \[B, S\], got a Tensor"),
        ((IDS, IDS), r"whole numbers \[B, S\], got a tuple"),
        ({"input_ids": IDS[:0]}, r"a batch of shape \(0, 8\) has no token\. Leave it out"),
        ({"input_ids": IDS[:, :0]}, r"a batch of shape \(3, 0\) has no token\. Leave it out"),
        (
            {"input_ids": IDS, "attention_mask": torch.ones(3, 5)},
            r"`attention_mask` \(3, 5\) must have the shape of `input_ids`, \(3, 8\)",
        ),
    ],
)
def test_batches_that_cannot_be_run_are_named(batch, match):
    good = {"input_ids": IDS}
    for name, run_pass in PASSES.items():
        model = tiny_model()
        with pytest.raises(ValueError, match=match):
            run_pass(model, {"a": [good, batch]})
        assert is_untouched(model), name


def test_the_text_of_a_walk_is_looked_at_as_it_is_read():
    with pytest.raises(ValueError, match=r"'b' has token \d+, and the model knows 0 to 99"):
        CalibrationText.read({"b": [{"input_ids": IDS + 100}]}, vocab_size=100)
    assert CalibrationText.read({"b": [{"input_ids": IDS}]}, vocab_size=VOCAB_SIZE).num_tokens == {"b": 24}


@pytest.mark.parametrize("name", PASSES)
def test_no_corpus_and_an_empty_one(name):
    with pytest.raises(ValueError, match="needs at least one corpus, got none"):
        PASSES[name](tiny_model(), {})
    with pytest.raises(ValueError, match="Corpus 'a' has no batch"):
        PASSES[name](tiny_model(), {"a": []})


def test_grams_of_several_passes_refuse_what_the_first_one_would_use_up():
    batches = [{"input_ids": IDS}]
    once = iterate_grams(tiny_model(), loaders={"a": iter(batches)}, memory_gb=1e-4, progress=False)
    with pytest.raises(ValueError, match=r"Corpus 'a' is a list_iterator, .* take 2 passes .* raise `memory_gb`"):
        list(once)
    enough = list(iterate_grams(tiny_model(), loaders={"a": iter(batches)}, progress=False))
    repeated = list(iterate_grams(tiny_model(), loaders={"a": batches}, memory_gb=1e-4, progress=False))
    assert [gram.layer_index for gram in enough] == [gram.layer_index for gram in repeated] == [0, 1]


def test_one_token_and_rows_of_padding():
    """A row of one token counts as one, a row of padding as none, and neither makes NaN."""
    model, ids = tiny_model(), random_tokens(batch=3, length=8)
    one = collect_statistics(model, loaders={"a": [{"input_ids": ids[:1, :1]}]}, progress=False)
    assert [int(layer["num_tokens"]) for layer in one.corpora["a"]] == [1, 1]
    assert float(one.corpora["a"][0]["count"].sum()) == 2
    gradients = collect_gradients(model, loaders={"a": [{"input_ids": ids[:1, :1]}]}, progress=False)
    assert float(gradients["a"][0]["loss_taylor"].sum()) == 0  # no next token, no loss
    mask = torch.ones_like(ids)
    mask[1] = 0
    padded = collect_statistics(model, loaders={"a": [{"input_ids": ids, "attention_mask": mask}]}, progress=False)
    without = collect_statistics(model, loaders={"a": [{"input_ids": ids[[0, 2]]}]}, progress=False)
    for own, expected in zip(padded.corpora["a"], without.corpora["a"], strict=True):
        for name, value in expected.items():
            torch.testing.assert_close(own[name], value, rtol=1e-4, atol=1e-9, msg=name)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = save_job(tmp_path_factory.mktemp("job"))
    tiny_model(vocab_size=200).save_pretrained(folder / "other")  # the text has tokens up to 4095
    return folder


@pytest.mark.parametrize("name", ["calibrate", "evaluate", "teach"])
def test_text_of_another_tokenizer_is_told_by_every_command(job, tmp_path, capsys, name):
    with pytest.raises(SystemExit, match="1"):
        run(name, "--config", job / "data.yaml", "--model", job / "other", "--out", tmp_path / "out")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert f"{name}: Corpus 'a' has token " in said[0]
    assert "the model knows 0 to 199. Tokenise with the model's own tokenizer (`data.tokenizer`)." in said[0]


def test_text_of_another_tokenizer_stops_a_training_before_its_first_step(job, tmp_path):
    save_text(tmp_path)
    module = LanguageModelModule(source=str(job / "other"))
    with pytest.raises(ValueError, match=r"Corpus 'a' has token \d+, and the model knows 0 to 199"):
        quiet_trainer().fit(module, datamodule=text_module(tmp_path))


@pytest.mark.parametrize(
    ("records", "match"),
    [
        ([{"text": ""}] * 3, "Corpus 'a' is empty: all its documents are empty texts. Give a source with text"),
        ([{"text": None}], "Corpus 'a': .*'text' must hold text"),
        ([{"text": "a"}], "Corpus 'a' has 2 tokens, less than one row of 32 to train on. Give more text"),
    ],
)
def test_corpora_with_nothing_to_train_on(job, tmp_path, records, match):
    corpus = Corpus(source=write_jsonl(tmp_path / "a.jsonl", records))
    save_text(tmp_path / "..")
    module = LanguageModelModule(source=str(job / "model"))
    with pytest.raises(ValueError, match=match):
        quiet_trainer().fit(module, datamodule=text_module(tmp_path / "..", train={"a": corpus}))


def test_a_corpus_shorter_than_a_row_calibrates_and_says_what_that_is_worth(job, tmp_path, caplog):
    corpus = Corpus(source=write_jsonl(tmp_path / "short.jsonl", [{"text": "a"}]))
    data = text_module(job, calibration={"short": corpus})
    model = tiny_model(vocab_size=4096)
    with caplog.at_level(logging.WARNING, logger="lightning_moe"):
        statistics = collect_statistics(model, loaders=data.calibration_dataloaders(), progress=False)
    unseen = sum(int((layer["count"] == 0).sum()) for layer in statistics.total())
    assert unseen >= 8  # two tokens reach four of eight experts at most, in each of two layers
    assert f"{unseen} of 16 experts got none of the 2 calibration tokens" in caplog.text
    assert "goes first" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="lightning_moe"):
        collect_statistics(model, loaders={"a": [{"input_ids": random_tokens(batch=8, length=32)}]}, progress=False)
    assert caplog.text == ""
