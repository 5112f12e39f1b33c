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
    return _acting(lambda count: count == number, action)


def from_place(number: int, action: Callable[[str, Any], None]) -> Callable[[], None]:
    """The same before change `number` and each one after it."""
    return _acting(lambda count: count >= number, action)


def _acting(is_due: Callable[[int], bool], action: Callable[[str, Any], None]) -> Callable[[], None]:
    def install() -> None:
        waiting = _waiting(Path.cwd())
        waiting.touch()

        def reached(count: int, event: str, arguments: Any) -> None:
            if is_due(count):
                waiting.unlink(missing_ok=True)
                action(event, arguments)

        _watched(reached)()

    return install


def was_missed(folder: Path) -> bool:
    """Whether the last `at_place` of a process in `folder` never came to its place: nothing was done there."""
    missed = _waiting(folder).exists()
    _waiting(folder).unlink(missing_ok=True)
    return missed


def _waiting(folder: Path) -> Path:
    """Beside the folder, whose contents are compared."""
    return folder.with_name(f"{folder.name}.waiting")


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
