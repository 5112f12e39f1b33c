"""Checkpoint files as data: opened without running what is in them, and refused in one line where they are damaged."""

import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Self

import torch
from fsspec.core import url_to_fs
from lightning import LightningModule
from torch import Tensor
from typing_extensions import override

from lightning_moe.files import one_line
from lightning_moe.training.shard_files import TABLE, check_shards

# What PyTorch's restricted unpickler raises where a file says something else than a checkpoint would.
_ERRORS = (
    OSError,
    RuntimeError,
    EOFError,
    UnpicklingError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    struct.error,
    zipfile.BadZipFile,
)
# Keys of a Lightning checkpoint that are mappings, where they are there.
_MAPPINGS = ("state_dict", "hyper_parameters", "callbacks", "loops", "lightning_moe")
# What Lightning's command line adds to the saved settings of a module; the last is the name of its class.
COMMAND_LINE_ENTRIES = ("_instantiator", "_class_path")


def named_class(checkpoint: Mapping[str, Any]) -> object:
    """What a checkpoint says its module's class is; None where the command line did not write it."""
    return checkpoint.get("hyper_parameters", {}).get(COMMAND_LINE_ENTRIES[-1])


def read_checkpoint(path: str | Path, *, trusted: bool = False) -> dict[str, Any]:
    """A Lightning checkpoint, whose tensors are maps of the file; nothing in it is executed.

    Args:
        path: the file, or `meta.pt` in a folder of shards, all of which are then looked through.
        trusted: unpickle it, which runs code that is in it: for files that its user made.

    Raises:
        ValueError: there is no such file, it is damaged, holds objects that only unpickling could make, or Lightning
            did not write it.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no checkpoint '{path}': there is no such file.")
    with checkpoint_errors(path):
        _check_archive(path)
        if not trusted and path.name == "meta.pt" and (path.parent / TABLE).exists():
            check_shards(path.parent)
        content = torch.load(path, map_location="cpu", weights_only=not trusted, mmap=True)
    check_content(content, path=path)
    return content


class CheckpointedModule(LightningModule):
    """A module whose checkpoints are looked through before Lightning loads them, and never unpickled unasked."""

    @classmethod
    @override
    def load_from_checkpoint(
        cls, checkpoint_path: Any, *args: Any, weights_only: bool | None = None, **kwargs: Any
    ) -> Self:
        """Lightning's own, which by itself runs code from checkpoints that it reads over http.

        Args:
            checkpoint_path: file, folder, URL or open file.
            *args: Lightning's.
            weights_only: false runs code that is in the checkpoint.
            **kwargs: Lightning's, and settings of the module.

        Raises:
            ValueError: see `read_checkpoint`.
        """
        if isinstance(checkpoint_path, str | Path) and url_to_fs(str(checkpoint_path))[0].protocol[0] == "file":
            content = read_checkpoint(checkpoint_path, trusted=weights_only is False)
            if "state_dict" not in content:
                raise ValueError(f"The checkpoint '{checkpoint_path}' holds no weights: it has no `state_dict`.")
        safely = weights_only is not False
        try:
            return super().load_from_checkpoint(checkpoint_path, *args, weights_only=safely, **kwargs)
        except (RuntimeError, UnpicklingError) as error:
            passing = ("loading state_dict", "allocate memory")  # it is of another model, or too large
            if isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in passing):
                raise
            with checkpoint_errors(checkpoint_path):
                raise


@contextmanager
def checkpoint_errors(path: str | Path) -> Iterator[None]:
    """What PyTorch raises for a damaged or hostile file becomes a ValueError that names it."""
    try:
        yield
    except UnpicklingError as error:
        told = " ".join(str(error).split()).rpartition("WeightsUnpickler error: ")[2].partition(" Please ")[0]
        said = told.rpartition("from a trusted source. ")[2]  # what precedes it advises to run the file's code
        raise ValueError(
            f"The checkpoint '{path}' cannot be read as data: {said[:300].rstrip('.')}. It is damaged, or "
            "holds objects that could run code, which are never made. Take another one."
        ) from error
    except _ERRORS as error:
        raise ValueError(
            f"The checkpoint '{path}' cannot be read: {one_line(error)}. Was the run killed while it was written, or "
            "copied in part? Resume from an older one."
        ) from error


def _check_archive(path: Path) -> None:
    """Refuses an archive that would take more memory than the file has bytes: PyTorch never compresses.

    Raises:
        ValueError: it is no zip archive, or has compressed or overlapping members.
        zipfile.BadZipFile: it is damaged.
    """
    if not zipfile.is_zipfile(path):
        raise ValueError("it is no checkpoint of PyTorch (a zip archive)")
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("it has compressed members, which PyTorch never writes")
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise ValueError("its members are larger than the file")


def check_content(content: object, *, path: str | Path) -> None:
    """Refuses what is no checkpoint of Lightning.

    Raises:
        ValueError: see above.
    """
    if not isinstance(content, dict) or not isinstance(content.get("pytorch-lightning_version"), str):
        raise ValueError(f"'{path}' is no checkpoint: Lightning did not write it. Give one of a ModelCheckpoint.")
    odd = [key for key in _MAPPINGS if key in content and not isinstance(content[key], Mapping)]
    if odd:
        raise ValueError(
            f"The checkpoint '{path}' is damaged: `{odd[0]}` in it is no mapping. Resume from an older one."
        )
    state = content.get("state_dict", {})
    odd = [name for name, value in state.items() if not isinstance(name, str) or not isinstance(value, Tensor)]
    if odd:
        raise ValueError(f"The checkpoint '{path}' is damaged: `state_dict` holds {odd[0]!r:.60}, which is no tensor.")
