"""Refusals that no test of their own area meets: each message by its words."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from lightning import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from statistics_factory import make_statistics
from tiny_models import tiny_model

from callbacks._strategy import check_gatherable
from lightning_moe.criteria import EXPERT_CRITERIA, register_expert_criterion
from lightning_moe.training.corpora import Corpus, read_records
from lightning_moe.training.module import LanguageModelModule
from lightning_moe.training.sharding import shard_model


def test_statistics_of_other_weights_are_not_merged():
    one = make_statistics()
    weights = tuple({name: value * 2 for name, value in layer.items()} for layer in one.weights)
    with pytest.raises(ValueError, match=r"_sq_norm differs, so the weights do\. Calibrate the same model"):
        one.merge(replace(one, weights=weights))


def test_a_corpus_without_a_record_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.jsonl").write_text("")
    corpus = Corpus(source=str(tmp_path / "empty"), format="jsonl")
    with pytest.raises(ValueError, match=r"Corpus 'wiki': .* is empty\. Give a (source|file) with at least one record"):
        next(read_records(corpus, name="wiki"))


def test_a_criterion_keeps_its_name():
    with pytest.raises(ValueError, match=r"The criterion 'reap' exists already\. Choose another name"):
        register_expert_criterion(EXPERT_CRITERIA["reap"], name="reap")


def test_parameters_of_two_types_are_not_sharded():
    model = tiny_model("qwen3_moe", dtype=torch.bfloat16)
    model.lm_head.float()
    mesh = {"tensor_parallel": SimpleNamespace(size=lambda: 1)}
    with pytest.raises(ValueError, match=r"FSDP2 trains parameters of one type, and these differ: .*torch\.float32"):
        shard_model(model, mesh=mesh)


class Unsaved(LanguageModelModule):
    """Someone's module that takes an argument and does not save it."""

    def __init__(self, prompt: str) -> None:
        LightningModule.__init__(self)
        self.prompt = prompt


def test_a_sharded_module_that_cannot_be_made_again_is_not_exported():
    trainer = SimpleNamespace(strategy=ModelParallelStrategy.__new__(ModelParallelStrategy))
    with pytest.raises(ValueError, match="and Unsaved cannot be made from its `hparams`: missing a required argument"):
        check_gatherable(trainer, Unsaved("hello"))
