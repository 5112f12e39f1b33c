"""Hidden states between two decoder layers as a file: written and read one batch after the other.

B sequences, S tokens of one, H hidden.
"""

import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from lightning_moe.files import write_atomically

# Before each batch: type, B, S, H, and CRC-32 of the bytes that follow.
_HEADER = struct.Struct("<5I")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@contextmanager
def writing_hidden_states(path: Path) -> Iterator[Callable[[Tensor], None]]:
    """Gives what appends a batch `[B, S, H]`, of any device; the file takes its name when the block ends.

    Raises:
        ValueError: the disk is full, or the folder cannot be written to; the message names the file.
    """
    with write_atomically(path) as temporary, ExitStack() as stack:
        with _write_errors(path):
            file = stack.enter_context(temporary.open("wb", buffering=0))

        def append(hidden_BSH: Tensor) -> None:
            hidden_BSH = hidden_BSH.detach().cpu().contiguous()
            content = _bytes_of(hidden_BSH)
            header = _HEADER.pack(_DTYPES.index(hidden_BSH.dtype), *hidden_BSH.shape, zlib.crc32(content))
            with _write_errors(path):
                _write(file, memoryview(header))
                _write(file, content)

        yield append


def read_hidden_states(path: Path) -> Iterator[Tensor]:
    """The batches of a file, each `[B, S, H]` in its own type on the CPU. Plain reads: no page stays in the process.

    Raises:
        ValueError: the file is missing, shorter than it should be, or its bytes changed; the message names it.
    """
    if not path.is_file():
        raise ValueError(f"There are no hidden states at '{path}'. {_ADVICE}")
    with path.open("rb", buffering=0) as file:
        while header := file.read(_HEADER.size):
            yield _read_batch(file, header, path=path)


_ADVICE = "Remove its folder and run again: the work starts anew."


def _read_batch(file: IO[bytes], header: bytes, *, path: Path) -> Tensor:
    damaged = f"The hidden states in '{path}' are damaged. {_ADVICE}"
    if len(header) < _HEADER.size:
        raise ValueError(damaged)
    code, *shape, checksum = _HEADER.unpack(header)
    if code >= len(_DTYPES):
        raise ValueError(damaged)
    size = _DTYPES[code].itemsize * shape[0] * shape[1] * shape[2]
    if size > path.stat().st_size:
        raise ValueError(damaged)
    hidden_BSH = torch.empty(shape, dtype=_DTYPES[code])
    content = _bytes_of(hidden_BSH)
    if _read_into(file, content) < size or zlib.crc32(content) != checksum:
        raise ValueError(damaged)
    return hidden_BSH


def _bytes_of(value: Tensor) -> memoryview:
    return value.view(-1).view(torch.uint8).numpy().data


def _write(file: IO[bytes], content: memoryview) -> None:
    """All of it: one call of the system writes 2 GB at most."""
    while content:
        content = content[file.write(content) :]


def _read_into(file: IO[bytes], content: memoryview) -> int:
    """Number of bytes read: fewer than asked for at the end of the file."""
    done = 0
    while done < len(content):
        read = file.readinto(content[done:])  # pyright: ignore[reportAttributeAccessIssue]: an unbuffered file has it
        if not read:
            break
        done += read
    return done


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"The hidden states '{path}' cannot be written: {error}. Make room there, or work in another folder; "
            "run again to go on after the last whole layer."
        ) from error
