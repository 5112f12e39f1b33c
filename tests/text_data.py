"""Hand-made corpora and data modules for the tests of text data."""

import json

import torch

from lightning_moe.training.data import TextDataModule

TOKENIZER = "asset:small_moe"


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def data_module(*, sequence_length=8, **kwargs):
    return TextDataModule(tokenizer=TOKENIZER, sequence_length=sequence_length, **kwargs)


def only_batch(loader):
    (batch,) = list(loader)
    return batch


def read_text(loader, tokenizer):
    batches = list(loader)
    ids = torch.cat([batch["input_ids"][batch["attention_mask"].bool()] for batch in batches])
    return tokenizer.decode(ids)
