"""Readers of files that hold text: plans, results, manifests, cards, corpora, tokenizers, configs."""

import os
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import datasets
import torch
from fuzzing import text_samples as samples
from fuzzing.readers import Reader
from jsonargparse import ArgumentError

from lightning_moe.cli import command_parser, one_line
from lightning_moe.commands._sizing import SizeQuestion
from lightning_moe.commands._yaml import check_config_files, checked_configs
from lightning_moe.commands.reporting import read_rows, report
from lightning_moe.evaluation.stages import load_stages
from lightning_moe.evaluation.summary import summarise
from lightning_moe.export.manifest import CARD_NAME, read_manifest
from lightning_moe.export.model_card import told_of_card, write_card
from lightning_moe.files import read_json
from lightning_moe.records import ChannelScores, ExpertScores, PrunePlan
from lightning_moe.reporting.report import write_report
from lightning_moe.reporting.table import summary_table
from lightning_moe.reporting.words import plan_in_words
from lightning_moe.surgery.structure import ModelStructure
from lightning_moe.training.corpora import Corpus, check_corpus
from lightning_moe.training.examples import message_examples
from lightning_moe.training.tokenization import corpus_rows, load_tokenizer

_TALK = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})


def _read_plan(folder: Path) -> None:
    plan = PrunePlan.load(folder / "plan.json")
    assert PrunePlan.from_dict(plan.to_dict()).digest == plan.digest
    assert plan.summary()
    assert plan_in_words(plan)


def _read_scores(folder: Path) -> None:
    for scores in (
        ChannelScores.load(folder / "channels.safetensors"),
        ExpertScores.load(folder / "experts.safetensors"),
    ):
        assert all(bool(torch.isfinite(score).all()) for score in scores.scores)
        assert scores.digest


def _read_structure(folder: Path) -> None:
    structure = ModelStructure.from_dict(read_json(folder / "structure.json", what="structure"))
    assert ModelStructure.from_dict(structure.to_dict()).to_dict() == structure.to_dict()


def _read_manifest(folder: Path) -> None:
    manifest = read_manifest(folder)
    if manifest is None:
        return
    told_of_card(folder)
    own = _new(folder)
    own.mkdir()
    (own / "config.json").write_text('{"model_type": "qwen3_moe"}', encoding="utf-8")
    # An export's own manifest: from the one that was read it takes the base model, the plans and what was dropped.
    write_card(own, manifest=replace(manifest, format="ragged", source=str(folder), versions={}))
    check_card((own / CARD_NAME).read_text(encoding="utf-8"))


def check_card(text: str) -> None:
    """A card holds our headings and no HTML but the seal, whatever the manifest said."""
    lines = text.splitlines()
    titles = [line for line in lines if line.startswith("#")]
    assert [title for title in titles if title.startswith("## ")] == [
        "## What was cut",
        "## How to load it",
        "## Sizes",
        "## Where it comes from",
    ]
    body = "\n".join(line for line in lines if not line.startswith("<!-- lightning_moe"))
    assert "<script" not in body


def _read_rows(folder: Path) -> None:
    load_stages(folder)
    summary_table(summarise(folder))


def _read_comparison(folder: Path) -> None:
    rows = read_rows(folder / "compare.json", what="comparison", needed=("name", "method"))
    if rows is not None:
        write_report(_new(folder), title="t", rows=rows)


def _read_matrix(folder: Path) -> None:
    rows = read_rows(folder / "matrix.json", what="matrix", needed=("method", "evaluation"))
    if rows is not None:
        write_report(_new(folder), title="t", matrix=rows)


def _new(folder: Path) -> Path:
    """A place for a page; what an earlier reading left is not replaced, which would remove it."""
    return folder / f"page_{len(list(folder.iterdir()))}"


def _undrawn(read: object, folder: Path) -> None:
    """Without the pixels of figures, which take most of the time."""
    with patch("lightning_moe.reporting.page.png_bytes", return_value=b""):
        read(folder)  # pyright: ignore[reportCallIssue]


def _rows_alone(folder: Path) -> None:
    _undrawn(_read_comparison, folder)


def _matrix_alone(folder: Path) -> None:
    _undrawn(_read_matrix, folder)


def _report(folder: Path) -> None:
    if (folder / "report").is_dir():
        (folder / "report").rename(_new(folder))
    report(folder=str(folder))
    page = (folder / "report" / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page


def _load_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    ids = tokenizer("abc")["input_ids"]
    assert all(isinstance(number, int) for number in ids)


def _render(folder: Path) -> None:
    list(message_examples(list(_TALK), name="talk", tokenizer=load_tokenizer(str(folder))))


def _read_corpus(folder: Path, **settings: object) -> None:
    """Caches of the library are beside the corpus."""
    name = next((name for name in os.listdir(folder) if name.startswith("corpus.")), "corpus.jsonl")
    corpus = Corpus(source=str(folder / name), **settings)  # pyright: ignore[reportArgumentType]
    check_corpus(corpus, name="own")
    cache = folder / "cache"
    with patch.object(datasets.config, "HF_DATASETS_CACHE", cache):
        rows = corpus_rows(corpus, name="own", tokenizer=_tokenizer(), sequence_length=128, keep_last=True)
    assert all(len(rows[index]["input_ids"]) == 128 for index in range(len(rows)))


def _tokenizer() -> object:
    if "own" not in _kept:
        _kept["own"] = load_tokenizer("asset:small_moe")
    return _kept["own"]


_kept: dict[str, object] = {}


def _read_instructions(folder: Path) -> None:
    _read_corpus(folder, format="instruction")


def _read_messages(folder: Path) -> None:
    _read_corpus(folder, format="messages")


def _parse_config(folder: Path) -> None:
    file = folder / "config.yaml"
    if not file.is_file():
        return  # a pipe, as a shell makes one of a command's output, is waited for
    try:
        with checked_configs(classes=False):
            check_config_files(["--config", str(file)], classes=False)
            parser = command_parser("compare")
            parser.instantiate_classes(parser.parse_args(["--config", str(file)]))
    except (ArgumentError, ValueError) as error:
        raise ValueError(one_line(error).replace('"', "'")) from error  # the parser's own quotes


def _size(folder: Path) -> None:
    question = SizeQuestion(
        config_json=str(folder / "config.json"),
        prune_ratio=0.5,
        keep_ratio=None,
        fit=None,
        align=1,
        bits=4,
        dtype="auto",
    )
    assert question.answer().text()


TEXT_READERS: tuple[Reader, ...] = (
    Reader(name="plan", make=samples.make_plan, read=_read_plan),
    Reader(name="scores", make=samples.make_scores, read=_read_scores),
    Reader(name="model_structure", make=samples.make_structure, read=_read_structure),
    Reader(name="manifest", make=samples.make_manifest, read=_read_manifest),
    Reader(name="rows", make=samples.make_rows, read=_read_rows),
    Reader(name="comparison", make=samples.make_comparison, read=_rows_alone),
    Reader(name="matrix", make=samples.make_matrix, read=_matrix_alone),
    Reader(name="report", make=samples.make_results, read=_report),
    Reader(name="tokenizer", make=samples.make_tokenizer, read=_load_tokenizer),
    Reader(name="chat_template", make=samples.make_tokenizer, read=_render, files=("chat_template.jinja",)),
    Reader(name="corpus_text", make=samples.make_text, read=_read_corpus),
    Reader(name="corpus_instructions", make=samples.make_instructions, read=_read_instructions),
    Reader(name="corpus_messages", make=samples.make_messages, read=_read_messages),
    Reader(name="corpus_plain", make=samples.make_plain_text, read=_read_corpus),
    Reader(name="corpus_parquet", make=samples.make_parquet, read=_read_corpus),
    Reader(name="run_config", make=samples.make_run_config, read=_parse_config),
    Reader(name="sizes_from_config", make=samples.make_config, read=_size),
)
