"""What a fuzzed reader is: a function that writes a valid sample, and the public function that reads it."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self


@dataclass(frozen=True, kw_only=True)
class Reader:
    """One public reading function.

    Args:
        name: what findings and `--only` call it.
        make: writes a valid sample into an empty folder; small, and the same every time.
        read: reads the sample and uses what it got (asks for every tensor, say), so that what was accepted is sound.
        refusals: what it may raise; the message must name a file or a field.
        files: names of the sample's files that are damaged; all of them without any.
    """

    name: str
    make: Callable[[Path], None]
    read: Callable[[Path], object]
    refusals: tuple[type[Exception], ...] = (ValueError, OSError)
    files: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The files of a valid sample, in memory.

    Args:
        files: path below the folder -> content.
        damaged: those that may be damaged.
    """

    files: Mapping[str, bytes] = field(repr=False)
    damaged: tuple[str, ...]

    @classmethod
    def of(cls, reader: Reader, *, folder: Path) -> Self:
        """Makes the sample in `folder`, which is emptied before."""
        empty(folder)
        reader.make(folder)
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        files = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
        return cls(files=files, damaged=reader.files or tuple(files))


def empty(folder: Path) -> None:
    """Leaves an empty folder, whatever was there."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
