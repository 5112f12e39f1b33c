"""What several commands do alike."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_moe.assets import resolve_asset
from lightning_moe.models.loading import DtypeName, load_model
from lightning_moe.training.data import TextDataModule
from lightning_moe.training.tokenization import load_tokenizer

Loaders = Mapping[str, Iterable[Mapping[str, Tensor]]]
Device = Literal["auto", "cpu", "cuda"]


def resolve_device(device: Device) -> str:
    """The device's name; `auto` is the GPU if there is one."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def results_folder(out: str) -> Path:
    """The folder of results, made before any work is done.

    Raises:
        ValueError: nothing can be written there.
    """
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"`out` must be a folder that can be written to, got '{out}': {error}.") from error
    return folder


def load_on(model: str, *, dtype: DtypeName, device: Device, any_family: bool = False) -> PreTrainedModel:
    """The model on a device."""
    loaded = load_model(model, dtype=dtype, any_family=any_family)
    return loaded.to(resolve_device(device))  # pyright: ignore[reportArgumentType]: `to` is wrapped without its types


def tokenizer_beside(model: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a model; a folder may have none."""
    folder = Path(resolve_asset(model))
    if folder.is_dir() and not any(folder.glob("tokenizer*")):
        return None
    return load_tokenizer(model)


def held_out(data: TextDataModule) -> Loaders:
    """The validation corpora's loaders by name."""
    return dict(zip(data.validation_names, data.val_dataloader(), strict=True))
