"""What the examples share: the model and the text that come with the package, held-out loss, a table."""

import argparse
import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lightning_moe.assets import asset_path
from lightning_moe.models.discovery import expert_widths, moe_layers
from lightning_moe.reporting.table import Column, format_table

COLUMNS = (
    Column(key="step", header="step"),
    Column(key="channels", header="channels kept", text="{:,}".format),
    Column(key="parameters", header="parameters", text="{:,}".format),
    Column(key="before", header="held-out loss before", text="{:.4f}".format),
    Column(key="after", header="held-out loss after", text="{:.4f}".format),
    Column(key="unpruned", header="without pruning", text="{:.4f}".format),
)


def command_line(description: str, *, folder: str) -> argparse.ArgumentParser:
    """The options that every example has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps; cuts after a quarter and a half")
    parser.add_argument("--folder", type=Path, default=Path(folder), help=f"where files go (default: {folder})")
    return parser


def small_moe(folder: str | Path | None = None) -> PreTrainedModel:
    """The shipped Qwen3-MoE (5.5 M parameters) or a folder of it, in fp32 and ready to be trained."""
    return AutoModelForCausalLM.from_pretrained(folder or asset_path("small_moe"), dtype=torch.float32).train()


def text_rows(split: str, *, count: int, length: int = 128) -> Tensor:
    """`count` rows of `length` tokens of one split of the five domains, `[count, length]`, in a fixed mixed order."""
    tokenizer = AutoTokenizer.from_pretrained(asset_path("small_moe"))
    files = sorted(asset_path("text").glob(f"*/{split}.jsonl"))
    lines = chain.from_iterable(file.read_text(encoding="utf-8").splitlines() for file in files)
    texts = [json.loads(line)["text"] + tokenizer.eos_token for line in lines]
    ids = list(chain.from_iterable(tokenizer(texts)["input_ids"]))
    rows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:count]]


def text_batches(split: str, *, count: int, size: int = 8, length: int = 128) -> list[dict[str, Tensor]]:
    """`count` batches as transformers models take them: dicts of `input_ids` and `labels`, `[size, length]`."""
    rows = text_rows(split, count=count * size, length=length)
    return [{"input_ids": row, "labels": row} for row in rows.split(size)]


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, batches: Sequence[dict[str, Tensor]]) -> float:
    """Mean loss in nats per token; the model is left in the mode it was in."""
    was_training = model.training
    model.eval()
    losses = [float(model(**batch).loss) for batch in batches]
    model.train(was_training)
    return sum(losses) / len(losses)


def size_of(model: PreTrainedModel) -> dict[str, int]:
    """Channels of all experts, and parameters, tied ones once."""
    return {
        "channels": sum(sum(expert_widths(layer.experts)) for layer in moe_layers(model)),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def show(rows: Sequence[dict[str, Any]]) -> None:
    """The table of a run."""
    print(format_table(rows, columns=COLUMNS))
