"""What a user can get wrong in the description of data."""

import pytest
from datasets import Dataset
from text_data import data_module, write_jsonl
from transformers import AutoTokenizer

from lightning_moe.assets import asset_path
from lightning_moe.training.corpora import Corpus, check_corpus
from lightning_moe.training.tokenization import load_tokenizer


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sequence_length": 1}, "`sequence_length` must be at least 2, got 1"),
        ({"validation_sequence_length": 1}, "`validation_sequence_length` must be at least 2, got 1"),
        ({"calibration_sequence_length": 0}, "`calibration_sequence_length` must be at least 2, got 0"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"validation_batch_size": 0}, "`validation_batch_size` must be at least 1, got 0"),
        ({"calibration_batch_size": -1}, "`calibration_batch_size` must be at least 1, got -1"),
        ({"num_workers": -1}, "`num_workers` must be at least 0, got -1"),
        ({"train": {}}, "`train` is an empty dict. Name at least one corpus"),
        ({"calibration": {"a": Corpus(source="nowhere.jsonl")}}, "'a': no file found at 'nowhere.jsonl'"),
        ({"validation": {"a": Corpus(source="asset:text/nothing.jsonl")}}, "No shipped file or folder is called"),
    ],
)
def test_wrong_arguments_are_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        data_module(**arguments)


def test_wrong_corpus_is_refused_at_once(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    with pytest.raises(ValueError, match=r"'a': unknown format 'poem'. Use one of text, instruction, messages"):
        check_corpus(Corpus(source=source, format="poem"), name="a")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="'a': `max_tokens` must be at least 1 or null for all, got 0"):
        check_corpus(Corpus(source=source, max_tokens=0), name="a")
    (tmp_path / "a.csv").write_text("text\n")
    with pytest.raises(ValueError, match=r"holds files of type .csv. Give files of one type among .txt"):
        check_corpus(Corpus(source=str(tmp_path / "a.csv")), name="a")
    (tmp_path / "a.txt").write_text("text\n")
    with pytest.raises(ValueError, match=r"holds files of type .jsonl, .txt"):
        check_corpus(Corpus(source=str(tmp_path)), name="a")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no file found at"):
        check_corpus(Corpus(source=str(tmp_path / "empty")), name="a")


@pytest.mark.parametrize(
    ("records", "corpus", "message"),
    [
        ([{"body": "a"}], {}, "has no field 'text', only body. Name the right one"),
        ([{"text": "a"}], {"field": "body"}, "has no field 'body', only text"),
        ([{"instruction": "a", "output": "b"}], {"format": "instruction"}, "no field 'input'"),
        ([{"text": 3}], {}, "field 'text' must hold text, got int: '3'"),
        ([{"text": "a"}, {"text": None}], {}, "field 'text' must hold text, got NoneType"),
        ([{"text": ""}, {"text": ""}], {}, "is empty: all its documents are empty texts"),
        ([{"text": "a"}], {}, "has 2 tokens, less than one row of 8 to train on"),
        (
            [{"instruction": "word " * 90, "input": "", "output": "b"}],
            {"format": "instruction"},
            "in all of its 1 examples the prompt fills the row of 8 tokens",
        ),
        ([{"messages": "Hi"}], {"format": "messages"}, "messages must be a list"),
    ],
)
def test_wrong_records_are_refused_by_name(tmp_path, records, corpus, message):
    source = write_jsonl(tmp_path / "a.jsonl", records)
    module = data_module(train={"mine": Corpus(source=source, **corpus)})
    with pytest.raises(ValueError, match=f"(?s)Corpus 'mine'.*{message}"):
        module.setup("fit")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.jsonl", "", "is empty. Give a file with at least one record"),
        ("a.json", "[]", "is empty|cannot read"),
        ("a.jsonl", '{"text": ', "cannot read"),
        ("a.parquet", "not parquet", "cannot read"),
    ],
)
def test_broken_files_are_refused_by_name(tmp_path, file, content, message):
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=f"(?s)Corpus 'mine'.*({message})"):
        data_module(train={"mine": Corpus(source=str(tmp_path / file))}).setup("fit")


def test_missing_corpora_and_tokenizers_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`data.train` names no corpora"):
        data_module().train_dataloader()
    with pytest.raises(ValueError, match=r"`data.calibration` names no corpora"):
        data_module().calibration_dataloaders()
    with pytest.raises(ValueError, match="No tokenizer found at"):
        load_tokenizer(str(tmp_path))


def test_tokenizer_without_end_of_text_is_refused(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(asset_path("small_moe"))
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no end-of-text token"):
        load_tokenizer(str(tmp_path))


def test_hub_that_cannot_be_reached_names_the_corpus(monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr("lightning_moe.training.corpora.load_dataset", unreachable)
    module = data_module(train={"web": Corpus(source="someone/something", max_tokens=10)})
    with pytest.raises(ValueError, match=r"Corpus 'web': cannot read 'someone/something' \(no route\)"):
        module.setup("fit")


def test_hub_is_streamed_where_tokens_are_limited(monkeypatch):
    calls = []

    def load(path, subset, **kwargs):
        calls.append((path, subset, kwargs))
        return Dataset.from_dict({"text": ["Some words of text here."] * 8})

    monkeypatch.setattr("lightning_moe.training.corpora.load_dataset", load)
    corpora = {
        "some": Corpus(source="someone/some", subset="en", split="test", max_tokens=16),
        "all": Corpus(source="someone/all"),
    }
    rows = data_module(train=corpora).rows("train")
    assert calls == [
        ("someone/some", "en", {"split": "test", "streaming": True}),
        ("someone/all", None, {"split": "train", "streaming": False}),
    ]
    assert rows["some"].num_tokens == 16
