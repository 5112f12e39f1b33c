"""Faults of data: text that is missing, empty, too short or of another tokenizer, and loaders that raise."""

import json
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from faults.cases import Case, CaseFolder, Expectation, Outcome, completed, disturbed, refused
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_moe.training.module import LanguageModelModule
from lightning_moe.training.packing import NO_LOSS, Rows

# Stages that read text: calibration, its second pass in the repair, and training.
_READING = ("calibrate", "prune", "recover")


def _spoiled(folder: CaseFolder, *, spoil: Callable[[Path], None], expects: Expectation) -> Outcome:
    return disturbed(folder, expects=expects, spoil=spoil, may_differ=True)


def _with_text(records: Iterable[Any], folder: Path) -> None:
    """Both corpora are these records."""
    for file in (folder / "text").glob("*.jsonl"):
        file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def _with_vocabulary(size: int, folder: Path) -> None:
    """The model knows so few tokens that the text cannot be of its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    model.resize_token_embeddings(size)
    model.save_pretrained(folder / "model")


def _raising(error: Exception, row: int) -> None:
    """A row of every corpus cannot be read any more."""
    get_row = Rows.__getitem__

    def get(self: Rows, index: int) -> dict[str, Tensor]:
        if index == row:
            raise error
        return get_row(self, index)

    Rows.__getitem__ = get


def _without_labels() -> None:
    """A step of training has no token that carries loss."""
    step = LanguageModelModule.training_step

    def training_step(self: LanguageModelModule, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if self.trainer.global_step == 1:
            batch = batch | {"labels": torch.full_like(batch["labels"], NO_LOSS)}
        return step(self, batch, batch_idx)

    LanguageModelModule.training_step = training_step


def _loader_raises(folder: CaseFolder, *, error: Exception, in_worker: bool) -> Outcome:
    words = "In a worker process of a data loader: row 3" if in_worker else ": row 3"
    arguments = [*folder.stage.arguments, "--data.num_workers", str(int(in_worker))]
    return disturbed(folder, expects=refused(words), child=partial(_raising, error, 3), arguments=arguments)


def _no_loss(folder: CaseFolder) -> Outcome:
    """It trains on other text than the second run, which must not go on from there."""

    def forget(path: Path) -> None:
        shutil.rmtree(path / "out" / "checkpoints")

    return disturbed(folder, expects=completed, child=_without_labels, remedy=forget, may_differ=True)


_SHORT = {"calibrate": completed, "prune": completed, "recover": refused("has 2 tokens, less than one row of 32")}
_TEXTS: dict[str, tuple[list[Any], Expectation]] = {
    "an empty file": ([], refused("is empty. Give a file with at least one record")),
    "empty texts": ([{"text": ""}] * 5, refused("all its documents are empty texts")),
    "no text at all": ([{"text": None}] * 5, refused("must hold text")),
    "another field": ([{"body": "words"}] * 5, refused("has no field 'text', only body")),
    "texts of one token": ([{"text": "a"}] * 100, completed),
}


# Training takes seconds: the short campaign has the cases that say most.
_LONG_FORM_ONLY = {"no text at all", "another field", "OSError in the process", "OSError in a worker"}
_QUICK_RECOVERIES = {"an empty file", "shorter than a row", "ValueError in a worker", "of another tokenizer"}


def _case(name: str, *, stage: str, fault: str, run: Callable[[CaseFolder], Outcome]) -> Case:
    quick = name in _QUICK_RECOVERIES if stage == "recover" else name not in _LONG_FORM_ONLY
    return Case(name=name, stage=stage, fault=fault, run=run, quick=quick)


def _cases() -> list[Case]:
    made = []
    for stage in _READING:
        for name, (records, expects) in _TEXTS.items():
            run = partial(_spoiled, spoil=partial(_with_text, records), expects=expects)
            made.append(_case(name, stage=stage, fault="text", run=run))
        short = partial(_spoiled, spoil=partial(_with_text, [{"text": "a"}]), expects=_SHORT[stage])
        made.append(_case("shorter than a row", stage=stage, fault="text", run=short))
        for kind in (ValueError, OSError):
            for in_worker in (False, True):
                run = partial(_loader_raises, error=kind("row 3 cannot be read"), in_worker=in_worker)
                name = f"{kind.__name__} in {'a worker' if in_worker else 'the process'}"
                made.append(_case(name, stage=stage, fault="loader", run=run))
    for stage in ("calibrate", "recover"):
        expects = refused("the model knows 0 to 99. Tokenise with the model's own tokenizer")
        run = partial(_spoiled, spoil=partial(_with_vocabulary, 100), expects=expects)
        made.append(_case("of another tokenizer", stage=stage, fault="text", run=run))
    made.append(Case(name="no token carries loss", stage="recover", fault="text", run=_no_loss))
    return made


CASES: list[Case] = _cases()
