"""What several commands do alike."""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Literal

import torch
from torch import Tensor, distributed
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_moe.assets import resolve_asset
from lightning_moe.calibration.processes import ALONE, Processes
from lightning_moe.models.loading import DtypeName, load_model
from lightning_moe.renaming import make_folder
from lightning_moe.training.data import TextDataModule
from lightning_moe.training.tokenization import load_tokenizer

Loaders = Mapping[str, Iterable[Mapping[str, Tensor]]]
_MODEL_FILES = ("config.json", "generation_config.json", "tokenizer*", "model*.safetensors", "model*.json")
Device = Literal["auto", "cpu", "cuda"]


def resolve_device(device: Device) -> str:
    """The device's name; `auto` is the GPU if there is one. Of several GPUs each process of torchrun takes its own."""
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return "cpu"
    return f"cuda:{os.environ['LOCAL_RANK']}" if distributed.is_torchelastic_launched() else "cuda"


@contextmanager
def processes(device: Device = "auto") -> Iterator[Processes]:
    """Those that torchrun started together, inside the block; this one alone without torchrun.

    Args:
        device: where they compute: they talk through NCCL on GPUs, else through gloo.
    """
    if not distributed.is_torchelastic_launched() or os.environ["WORLD_SIZE"] == "1":
        yield ALONE
        return
    own = resolve_device(device)
    if own != "cpu":
        torch.cuda.set_device(own)
    distributed.init_process_group("gloo" if own == "cpu" else "nccl")
    try:
        yield Processes.of_default_group()
    finally:
        distributed.destroy_process_group()


def working_folder(workspace: str | None, *, out: str) -> Path:
    """Where a command keeps what it needs to go on after it was interrupted: `OUT.partial` unless another is given."""
    out_path = Path(out)
    return Path(workspace) if workspace else out_path.with_name(f"{out_path.name}.partial")


def results_folder(out: str) -> Path:
    """The folder of results, made before any work is done.

    Raises:
        ValueError: nothing can be written there.
    """
    folder = Path(out)
    try:
        make_folder(folder)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"`out` must be a folder that can be written to, got '{out}': {error}.") from error
    return folder


def files_of(model: str | None) -> list[str]:
    """What lies in the folder of a model under the names that transformers reads; nothing of one on the hub."""
    folder = None if model is None else Path(resolve_asset(model)).expanduser()
    return [] if folder is None else [str(file) for pattern in _MODEL_FILES for file in sorted(folder.glob(pattern))]


def check_writable(out: str | Path, *, name: str = "out") -> None:
    """Refuses a file that cannot be written, before any work is done; nothing is made.

    Args:
        out: the file.
        name: of the argument that gave it.

    Raises:
        ValueError: it is a folder, or the folder where it would be cannot be written to.
    """
    path = Path(out)
    if path.is_dir():
        raise ValueError(f"`{name}` must be a file, '{out}' is a folder. Name a file in it.")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"`{name}` must be a file that can be written, got '{out}': {error}.") from error


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
