"""Where an export is made: beside its final name, which it gets by one rename when it is whole and compared."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from lightning_moe.files import move_into_place

_SUFFIX = ".unfinished"


class NotReproducedError(ValueError):
    """A finished export is not the model: it stays for inspection, away from the final name."""


@contextmanager
def made_beside(target: Path) -> Iterator[Path]:
    """Gives `NAME.unfinished/NAME` beside the target `NAME`; renames it to the target when the block ends well.

    Until then nothing of the target changes. What a killed run left in `NAME.unfinished` is removed first; what this
    one leaves there when it fails is removed too, but for an export that does not reproduce the model.

    Raises:
        ValueError: `NAME.unfinished` holds something else; or the disk does not take the export.
    """
    work = target.with_name(target.name + _SUFFIX)
    _clear(work, target=target)
    work.mkdir(parents=True)
    inspected = False
    try:
        with disk_errors(target):
            yield work / target.name
            move_into_place(work / target.name, target)
    except NotReproducedError:
        inspected = True
        raise
    finally:
        if not inspected:
            shutil.rmtree(work)


def _clear(work: Path, *, target: Path) -> None:
    """Removes what a killed run left; an older export that was on its way out when it was killed comes back."""
    if not work.is_dir():
        return
    retired = work / f"{target.name}.old"
    strange = [file.name for file in work.iterdir() if not file.name.startswith((".", target.name, "tmp"))]
    if strange:
        raise ValueError(
            f"'{work}' is where an export is made, and it holds '{min(strange)}', which no export left there. Move it."
        )
    if retired.is_dir() and not target.exists():
        os.replace(retired, target)
    shutil.rmtree(work)


@contextmanager
def disk_errors(target: str | Path) -> Iterator[None]:
    """Names the target where the disk does not take it.

    Raises:
        ValueError: in place of what safetensors and the operating system raise inside the block.
    """
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"The export '{target}' cannot be written: {error}. Nothing of it is left under that name, and an older "
            "export there is as it was. Make room, or name another folder."
        ) from error


def check_room(folder: str | Path, *, model: nn.Module, dtype: torch.dtype) -> None:
    """Refuses an export that the disk cannot take, before it is begun.

    Args:
        folder: where it goes.
        model: what is written; may be on the meta device.
        dtype: type of its matrices in the files; packed ones and vectors keep theirs.

    Raises:
        ValueError: the disk has less room than the tensors take at least.
    """
    place = next(parent for parent in Path(folder).absolute().parents if parent.is_dir())
    needed = sum(_least_bytes(parameter, dtype) for parameter in model.parameters())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ValueError(
            f"The export '{folder}' takes at least {needed / 1e9:.3g} GB, and its disk has {free / 1e9:.3g} GB left. "
            "Make room, or name another folder."
        )


def _least_bytes(parameter: nn.Parameter, dtype: torch.dtype) -> int:
    if not parameter.is_floating_point() or parameter.dim() < 2:
        return parameter.nbytes
    return parameter.numel() * min(dtype.itemsize, parameter.element_size())
