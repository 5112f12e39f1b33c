"""Places in a run: each time it is about to change something on the disk below its working directory."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CHANGES = frozenset(
    {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink", "shutil.rmtree"}
)
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def at_place(number: int, action: Callable[[str, Any], None]) -> Callable[[], None]:
    """For a child process: calls `action(event, its arguments)` right before change `number`, the first is 0."""
    return _watched(lambda count, event, arguments: action(event, arguments) if count == number else None)


def listing(file: Path) -> Callable[[], None]:
    """For a child process: writes a line to `file` for every place."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def note(count: int, event: str, arguments: Any) -> None:
        os.write(descriptor, f"{event} {arguments[0]}\n".encode())

    return _watched(note)


def _watched(reached: Callable[[int, str, Any], None]) -> Callable[[], None]:
    def install() -> None:
        folder, count = os.getcwd(), 0

        def hook(event: str, arguments: Any) -> None:
            nonlocal count
            if not _is_change(event, arguments, folder=folder):
                return
            count += 1
            reached(count - 1, event, arguments)

        sys.addaudithook(hook)

    return install


def _is_change(event: str, arguments: Any, *, folder: str) -> bool:
    if event == "open":
        if not isinstance(arguments[2], int) or not arguments[2] & _WRITES:
            return False
    elif event not in _CHANGES:
        return False
    path = arguments[0]
    if not isinstance(path, str | os.PathLike):
        return False
    return os.path.abspath(os.fspath(path)).startswith(f"{folder}/")
