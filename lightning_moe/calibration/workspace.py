"""The folder in which a long command keeps what it needs to go on after it was interrupted."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from lightning_moe.calibration.processes import ALONE, Processes
from lightning_moe.files import read_json, write_json
from lightning_moe.locks import Lock
from lightning_moe.renaming import make_folder, remove, remove_at_once, remove_left

_RUN = "run.json"
_TEMPORARY = ".*.tmp"
_LOCK = "run.lock"
_ANOTHER = "Give another working folder (`workspace`)"
# The locks of this process, by folder.
_locks: dict[Path, Lock] = {}


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """A folder of one run: `run.json`, which tells this run from another one, and files that are whole or not there.

    Args:
        path: the folder.
    """

    path: Path

    @classmethod
    def open(
        cls, path: str | Path, *, run: Mapping[str, str], processes: Processes = ALONE, another: str = _ANOTHER
    ) -> Self:
        """Makes the folder, or takes up what an interrupted run left there.

        Args:
            path: where; its parent must be writable.
            run: what must be the same for the files to be of use: checkpoint, text, settings.
            processes: those that share the run, and the folder.
            another: what to do where the folder is taken, for the message.

        Raises:
            ValueError: the folder is of another run (the message says what differs), in use by one, holds something
                else, or cannot be made.
        """
        path = Path(path)
        run = dict(run) | {"processes": str(processes.size)}
        with processes.together():
            if processes.rank == 0:
                _prepare(path, run=run, another=another)
        return cls(path=path)

    def file(self, name: str) -> Path:
        """Path of a file."""
        return self.path / name

    def done(self, name: str) -> bool:
        """Whether a file is there: then it is whole."""
        return self.file(name).is_file()

    def remove(self) -> None:
        """Removes the folder with all its files."""
        remove_at_once(self.path)
        lock = _locks.pop(self.path.absolute(), None)
        if lock is not None:
            lock.release()


def _prepare(path: Path, *, run: Mapping[str, str], another: str) -> None:
    try:
        make_folder(path)
        remove_left(path)
        left = set(path.glob(_TEMPORARY))
        if set(path.iterdir()) - left - {path / _LOCK}:
            _check_same(path, run=run, another=another)
        _lock(path, another=another)
        for file in left:
            remove(file)
        write_json(path / _RUN, dict(run))
    except OSError as error:
        raise ValueError(f"The working folder must be one that can be written to, got '{path}': {error}.") from error


def _lock(path: Path, *, another: str) -> None:
    """Keeps other runs out until this process ends or removes the folder; the lock of a dead one is gone."""
    if path.absolute() in _locks:
        return
    try:
        _locks[path.absolute()] = Lock.take(path / _LOCK)
    except BlockingIOError as error:
        raise ValueError(f"Another run is at work in '{path}'. Wait for it. {another} to run both.") from error


def _check_same(path: Path, *, run: Mapping[str, str], another: str) -> None:
    advice = f"{another}, or remove this one to start anew."
    if not (path / _RUN).is_file():
        raise ValueError(f"'{path}' holds something that is not of an interrupted run. {advice}")
    try:
        before: Any = read_json(path / _RUN, what="description of an interrupted run")
    except ValueError as error:
        raise ValueError(f"{error} {advice}") from error
    before = before if isinstance(before, dict) else {}
    differing = [
        f"{name} was {before.get(name)!r}, is {run.get(name)!r}"
        for name in dict.fromkeys([*run, *before])
        if before.get(name) != run.get(name)
    ]
    if differing:
        raise ValueError(f"'{path}' was left by another run: {'; '.join(differing)}. {advice}")
