"""Small pieces of whole runs: a model folder, text, trainers, and a LightningModule that is not ours."""

import json
import warnings

import torch
from lightning import LightningDataModule, LightningModule, Trainer
from tiny_models import random_tokens, tiny_model

from lightning_moe.assets import asset_path
from lightning_moe.training.corpora import Corpus
from lightning_moe.training.data import TextDataModule

SHIPPED_VOCABULARY = 4096


def save_model(folder, name="qwen3_moe", **overrides):
    """A tiny model folder whose vocabulary is the shipped tokenizer's."""
    tiny_model(name, vocab_size=SHIPPED_VOCABULARY, **overrides).save_pretrained(folder)
    return str(folder)


def save_text(folder, *, num_documents=6):
    """Two corpora `a.jsonl` and `b.jsonl`."""
    for name, domain in (("a", "code"), ("b", "glosses")):
        lines = asset_path(f"text/{domain}/recovery.jsonl").read_text(encoding="utf-8").splitlines()[:num_documents]
        records = [{"text": json.loads(line)["text"][:400]} for line in lines]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return folder


def text_module(folder, **overrides):
    """Train on a, calibrate on a, validate on a and b; rows of 32 tokens, batches of 4."""
    a, b = Corpus(source=str(folder / "a.jsonl")), Corpus(source=str(folder / "b.jsonl"))
    settings = {
        "train": {"a": a},
        "calibration": {"a": a},
        "validation": {"a": a, "b": b},
        "sequence_length": 32,
        "batch_size": 4,
    }
    return TextDataModule(tokenizer="asset:small_moe", **(settings | overrides))


def quiet_trainer(callbacks=(), **overrides):
    settings = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_val_batches": 0,
        "max_steps": 2,
    }
    with warnings.catch_warnings():
        # The tests that save a checkpoint say so themselves.
        warnings.filterwarnings("ignore", message=".*`ModelCheckpoint`.*")
        return Trainer(callbacks=list(callbacks), **(settings | overrides))


def token_batches(num_batches=8, *, seed=0):
    """A list of batches for a tiny model's own vocabulary of 128."""
    batches = []
    for index in range(num_batches):
        ids = random_tokens(batch=2, length=16, seed=100 * seed + index)
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
    return batches


def loader_of(batches, *, shuffle=False):
    """A list alone would be a collection of loaders to Lightning."""
    return torch.utils.data.DataLoader(batches, batch_size=None, shuffle=shuffle)


class ForeignData(LightningDataModule):
    """Somebody's own data module."""

    def __init__(self, loader):
        super().__init__()
        self.loader = loader

    def train_dataloader(self):
        return self.loader


class ForeignModule(LightningModule):
    """Somebody's own training loop: a transformers MoE as an attribute, AdamW in two groups, a step schedule."""

    def __init__(self, name="qwen3_moe", *, model=None, loader=None):
        super().__init__()
        self.lm = (tiny_model(name) if model is None else model).train()
        self.loader = loader
        self.losses = []
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["input_ids"])
        loss = self.lm(**batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        experts = [p for name, p in self.lm.named_parameters() if ".experts." in name]
        rest = [p for name, p in self.lm.named_parameters() if ".experts." not in name]
        optimizer = torch.optim.AdamW([{"params": experts, "lr": 1e-2}, {"params": rest, "lr": 1e-3}])
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class ForeignWithLoader(ForeignModule):
    """The same, with its own `train_dataloader`."""

    def train_dataloader(self):
        return self.loader
