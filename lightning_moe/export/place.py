"""Where an export is made: beside its final name, which it gets by one rename when it is whole and compared."""

import shutil
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from lightning_moe.locks import Lock
from lightning_moe.renaming import bring_back, make_folder, move_into_place, remove

_SUFFIX = ".unfinished"
_LOCK = ".lock"


class NotReproducedError(ValueError):
    """A finished export is not the model: it stays for inspection, away from the final name."""


@contextmanager
def made_beside(target: Path, *, goes_on: bool = False) -> Iterator[Path]:
    """Gives `NAME.unfinished/NAME` beside the target `NAME`; renames it to the target when the block ends well.

    Until then nothing of the target changes. What a killed run left in `NAME.unfinished` is removed first; what this
    one leaves there when it fails is removed too, but for an export that does not reproduce the model.

    Args:
        target: the final name.
        goes_on: keep the shards of an interrupted run, in `NAME.unfinished/NAME.partial`, for the next one.

    Raises:
        ValueError: `NAME.unfinished` holds something else, or another process is at work there; or the disk does not
            take the export.
    """
    work = target.with_name(target.name + _SUFFIX)
    kept = {f"{target.name}.partial"} if goes_on else set[str]()
    with disk_errors(target), _locked(work, target=target):
        _clear(work, target=target, kept=kept)
        inspected = False
        try:
            yield work / target.name
            move_into_place(work / target.name, target)
        except NotReproducedError:
            inspected = True
            raise
        finally:
            if not inspected:
                _sweep(work, kept=kept)


@contextmanager
def _locked(work: Path, *, target: Path) -> Iterator[None]:
    """The folder is there, and of this process alone; at the end it goes if nothing but the lock is in it."""
    make_folder(work)
    try:
        lock = Lock.take(work / _LOCK)
    except BlockingIOError as error:
        raise ValueError(
            f"Another run is writing the export '{target}'. Wait for it, or name another folder."
        ) from error
    try:
        yield
    finally:
        if {file.name for file in work.iterdir()} == {_LOCK}:
            shutil.rmtree(work)
        lock.release()


def _clear(work: Path, *, target: Path, kept: AbstractSet[str]) -> None:
    """Removes what a killed run left; an older export that was on its way out when it was killed comes back."""
    strange = [file.name for file in work.iterdir() if not file.name.startswith((".", target.name, "tmp"))]
    if strange:
        raise ValueError(
            f"'{work}' is where an export is made, and it holds '{min(strange)}', which no export left there. Move it."
        )
    bring_back(work / target.name, target)
    _sweep(work, kept=kept)


def _sweep(work: Path, *, kept: AbstractSet[str]) -> None:
    for file in list(work.iterdir()):
        if file.name not in {_LOCK, *kept}:
            remove(file)


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
