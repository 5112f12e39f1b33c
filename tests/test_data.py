"""Packing and text corpora, and what is shipped."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from jsonargparse import ArgumentParser
from text_data import TOKENIZER, data_module, only_batch, read_text, write_jsonl

from lightning_moe.assets import asset_path, resolve_asset
from lightning_moe.training.corpora import Corpus, read_records
from lightning_moe.training.data import TextDataModule
from lightning_moe.training.packing import TokenSpan, pack_examples, pack_stream
from lightning_moe.training.tokenization import corpus_rows, load_tokenizer

DOMAINS = ("speeches", "glosses", "code", "math", "manual")
SPLITS = ("recovery", "calibration", "validation", "heldout")
CONFIGS = sorted(Path(__file__).parents[1].glob("configs/data/*.yaml"))


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TOKENIZER)


def test_pack_stream_keeps_every_token_once_and_pads_the_last_row():
    rows = pack_stream(torch.arange(10, dtype=torch.int32), sequence_length=4, padding=99, keep_last=True)
    assert rows.input_ids_NS.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 99, 99]]
    assert rows[2]["attention_mask"].tolist() == [1, 1, 0, 0]
    assert rows[2]["labels"].tolist() == [8, 9, -100, -100]
    assert rows.num_tokens == 10


def test_pack_stream_drops_the_last_row_for_training():
    rows = pack_stream(torch.arange(10, dtype=torch.int32), sequence_length=4, padding=99, keep_last=False)
    assert rows.input_ids_NS.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert rows.num_tokens == 8


def test_pack_stream_without_a_rest_adds_no_row():
    rows = pack_stream(torch.arange(8, dtype=torch.int32), sequence_length=4, padding=99, keep_last=True)
    assert len(rows) == 2


def span(*tokens, prompt):
    return TokenSpan(input_ids=list(tokens), learn=[index >= prompt for index in range(len(tokens))])


def test_pack_examples_never_splits_an_example_over_rows():
    # 3 + 2 fit a row of 5; the next 4 open a second one; one that is all prompt is left out; the last is cut after 5.
    examples = [
        span(1, 2, 3, prompt=1),
        span(4, 5, prompt=1),
        span(6, 7, 8, 9, prompt=2),
        span(10, 11, 12, 13, 14, 15, prompt=5),
        span(16, 17, 18, 19, 20, 21, prompt=3),
    ]
    rows = pack_examples(examples, sequence_length=5, padding=0)
    assert rows.input_ids_NS.tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 0], [16, 17, 18, 19, 20]]
    assert rows[0]["labels"].tolist() == [-100, 2, 3, -100, 5]
    assert rows[1]["labels"].tolist() == [-100, -100, 8, 9, -100]
    assert rows[1]["attention_mask"].tolist() == [1, 1, 1, 1, 0]
    assert rows[2]["labels"].tolist() == [-100, -100, -100, 19, 20]


def test_text_corpus_is_its_documents_joined_by_end_of_text(tmp_path, tokenizer):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "One fish."}, {"text": ""}, {"text": "Two fish, red fish."}])
    module = data_module(validation={"a": Corpus(source=source)})
    (loader,) = module.val_dataloader()
    assert read_text(loader, tokenizer) == "One fish.<|endoftext|>Two fish, red fish.<|endoftext|>"
    batch = only_batch(loader)
    assert {key: value.dtype for key, value in batch.items()} == dict.fromkeys(batch, torch.int64)
    assert {value.shape for value in batch.values()} == {batch["input_ids"].shape}
    padded = batch["attention_mask"] == 0
    assert torch.equal(batch["labels"] == -100, padded)
    assert (batch["input_ids"][padded] == tokenizer.pad_token_id).all()


def test_separator_joins_documents_as_one_text(tmp_path, tokenizer):
    source = write_jsonl(tmp_path / "lines.jsonl", [{"text": "= Title ="}, {"text": ""}, {"text": "A line."}])
    module = data_module(validation={"a": Corpus(source=source, separator="\n\n")})
    assert read_text(module.val_dataloader()[0], tokenizer) == "= Title =\n\n\n\nA line.<|endoftext|>"


def test_every_kind_of_file_reads_the_same(tmp_path, tokenizer):
    texts = ["First document.\nSecond line.", "Another."]
    (tmp_path / "txt").mkdir()
    for index, text in enumerate(texts):
        (tmp_path / "txt" / f"{index}.txt").write_text(text)
    (tmp_path / "all.json").write_text(json.dumps([{"text": text} for text in texts]))
    Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "all.parquet")
    write_jsonl(tmp_path / "all.jsonl", [{"text": text} for text in texts])
    sources = ["txt", "txt/*.txt", "all.json", "all.parquet", "all.jsonl"]
    module = data_module(validation={name: Corpus(source=str(tmp_path / name)) for name in sources})
    read = {read_text(loader, tokenizer) for loader in module.val_dataloader()}
    assert read == {"First document.\nSecond line.<|endoftext|>Another.<|endoftext|>"}


def test_max_tokens_takes_exactly_so_many():
    corpus = Corpus(source="asset:text/code/calibration.jsonl", max_tokens=1001)
    assert data_module(calibration={"code": corpus}).rows("calibration")["code"].num_tokens == 1001


def test_shuffle_seed_changes_the_order_of_records_and_repeats(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": str(index)} for index in range(50)])
    plain = [record["text"] for record in read_records(Corpus(source=source), name="a")]
    first, second = (
        [record["text"] for record in read_records(Corpus(source=source, shuffle_seed=3), name="a")] for _ in range(2)
    )
    assert plain == [str(index) for index in range(50)]
    assert first == second != plain
    assert sorted(first) == sorted(plain)


def test_loaders_per_corpus_keep_the_order_of_the_dict():
    corpora = {name: Corpus(source=f"asset:text/{name}/validation.jsonl", max_tokens=64) for name in ("math", "code")}
    module = data_module(validation=corpora, calibration=corpora, batch_size=3, validation_batch_size=2)
    assert module.validation_names == module.calibration_names == ("math", "code")
    assert [loader.batch_size for loader in module.val_dataloader()] == [2, 2]
    loaders = module.calibration_dataloaders()
    assert list(loaders) == ["math", "code"]
    first, again = (torch.cat([batch["input_ids"] for batch in loaders["math"]]) for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize(
    ("length", "given", "expected"), [(256, None, 8), (512, None, 4), (4096, None, 1), (512, 8, 8)]
)
def test_a_calibration_batch_has_2048_tokens_unless_its_rows_are_given(length, given, expected):
    corpora = {"code": Corpus(source="asset:text/code/validation.jsonl", max_tokens=64)}
    module = data_module(calibration=corpora, sequence_length=length, batch_size=8, calibration_batch_size=given)
    assert module.calibration_batch_size == expected


def test_rows_have_the_length_of_their_role():
    corpora = {"code": Corpus(source="asset:text/code/validation.jsonl", max_tokens=64)}

    def lengths(**kwargs):
        module = data_module(train=corpora, validation=corpora, calibration=corpora, sequence_length=8, **kwargs)
        (validation,) = module.val_dataloader()
        loaders = (module.train_dataloader(), validation, module.calibration_dataloaders()["code"])
        return [next(iter(loader))["input_ids"].shape[1] for loader in loaders]

    assert lengths() == [8, 8, 8]
    assert lengths(validation_sequence_length=16) == [8, 16, 8]
    assert lengths(calibration_sequence_length=32) == [8, 8, 32]


def test_setup_tokenises_once():
    module = data_module(train={"code": Corpus(source="asset:text/code/calibration.jsonl", max_tokens=100)})
    module.setup("fit")
    rows = module.rows("train")["code"]
    module.setup("fit")
    assert module.rows("train")["code"] is rows


def test_without_validation_corpora_there_is_no_loader():
    assert data_module().val_dataloader() == []


def test_asset_names_resolve():
    assert asset_path("small_moe").is_dir()
    assert resolve_asset("asset:small_moe") == str(asset_path("small_moe"))
    assert resolve_asset("some/folder") == "some/folder"
    with pytest.raises(ValueError, match=r"called 'nothing'. Shipped folders: licenses, small_moe, text"):
        asset_path("nothing")


def test_shipped_splits_share_no_document():
    for domain in DOMAINS:
        ids, texts = [], []
        for split in SPLITS:
            with asset_path(f"text/{domain}/{split}.jsonl").open(encoding="utf-8") as file:
                records = [json.loads(line) for line in file]
            assert records
            ids += [record["id"] for record in records]
            texts += [hashlib.sha256(record["text"].strip().encode()).hexdigest() for record in records]
        assert len(set(ids)) == len(ids)
        assert len(set(texts)) == len(texts)


def test_shipped_text_is_small():
    sizes = [path.stat().st_size for path in asset_path("text").rglob("*.jsonl")]
    assert len(sizes) == len(DOMAINS) * len(SPLITS) + 2  # French: calibration and held-out text alone
    assert sum(sizes) <= 4_500_000


def test_shipped_tokenizer_writes_back_what_it_read(tokenizer):
    text = "def f(x):\n    return x ** 2  # 1917 — naïve\n\t|- ( ph -> ps )\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == 4096
    assert tokenizer.eos_token == tokenizer.bos_token == "<|endoftext|>"
    assert tokenizer.pad_token == "<|pad|>"


def preset_parser():
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(TextDataModule, "data")
    return parser


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_presets_parse_into_corpora(config):
    parser = preset_parser()
    parsed = parser.instantiate_classes(parser.parse_args([f"--config={config}", "--data.tokenizer=asset:small_moe"]))
    named = [corpus for corpora in parsed["data"].corpora.values() for corpus in corpora.values()]
    assert named
    assert all(isinstance(corpus, Corpus) and "/" in corpus.source for corpus in named)


@pytest.mark.parametrize("order", [("c4", "alpaca", "wikitext2"), ("wikitext2", "alpaca", "c4")])
def test_presets_together_keep_the_row_length_of_each_role(order):
    files = [f"--config={path}" for name in order for path in CONFIGS if path.stem == name]
    parser = preset_parser()
    data = parser.instantiate_classes(parser.parse_args([*files, "--data.tokenizer=asset:small_moe"]))["data"]
    assert data.sequence_lengths == {"train": 512, "validation": 2048, "calibration": 2048}


@pytest.mark.parametrize("form", ["text", "instruction"])
def test_samples_share_no_token_and_follow_each_other(form, tmp_path, tokenizer):
    if form == "text":
        records = [{"text": f"document {index} of many"} for index in range(80)]
    else:
        records = [{"instruction": f"count to {index}", "input": "", "output": "one two"} for index in range(40)]
    source = write_jsonl(tmp_path / "a.jsonl", records)
    whole = Corpus(source=source, format=form)
    options = {"name": "a", "tokenizer": tokenizer, "sequence_length": 64, "keep_last": True}
    expected = corpus_rows(whole, **options)
    parts = [corpus_rows(replace(whole, max_tokens=128), sample=sample, **options) for sample in (0, 1, 2)]
    read = [batch["input_ids"][batch["attention_mask"] == 1].tolist() for rows in parts for batch in rows]
    together = [token for row in read for token in row]
    everything = [token for batch in expected for token in batch["input_ids"][batch["attention_mask"] == 1].tolist()]
    assert together == everything[: len(together)]
    assert len(together) > 2.5 * 128


def test_a_sample_that_the_text_is_too_short_for_is_refused(tmp_path, tokenizer):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "a few words and no more"}])
    options = {"name": "a", "tokenizer": tokenizer, "sequence_length": 8, "keep_last": True, "sample": 1}
    with pytest.raises(ValueError, match=r"'a' has 0 tokens left for sample 1 of 100: 2 samples that share no text"):
        corpus_rows(Corpus(source=source, max_tokens=100), **options)
    with pytest.raises(ValueError, match="'a' needs `max_tokens`, which says how much text each of the samples takes"):
        corpus_rows(Corpus(source=source), **options)
