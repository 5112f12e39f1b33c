"""A finished file or folder takes its final name, in one step; and what killed processes left under other names."""

import ctypes
import errno
import glob
import hashlib
import os
import shutil
import sys
import uuid
from functools import cache
from pathlib import Path

_HERE = -100  # AT_FDCWD: paths are relative to the working directory
_EXCHANGE = 2  # RENAME_EXCHANGE
# What file systems say that cannot flush a folder; of those that can, it is none of theirs.
_NO_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)


def temporary_path(path: Path) -> Path:
    """A new hidden name beside `path`, which says what machine and what process made it."""
    return path.with_name(f".{path.name}.{_machine()}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")


def remove_left(path: Path) -> None:
    """Removes what processes of this machine that are no more left under `temporary_path`s of `path`."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.{_machine()}.*.*.tmp"):
        number = left.name.split(".")[-3]
        if number.isdecimal() and not _is_alive(int(number)):
            remove(left)


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it, where they are not there; a power cut takes none of them away again."""
    new = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for one in new:
        _flush_folder(one.parent)


def move_into_place(new: Path, path: Path) -> None:
    """Renames a file or folder to `path`, on the same disk; a folder that is there is replaced as a whole.

    Whoever wrote them, all bytes are on the disk before the name is given, and the name is before this returns: after
    a power cut the old file has it, or the new one, and neither is empty.

    Files get the permissions of any new file: safetensors makes its own readable by their owner alone.

    Raises:
        OSError: the disk does not take it.
    """
    mask = os.umask(0)
    os.umask(mask)
    for file in [new, *new.rglob("*")] if new.is_dir() else [new]:
        if file.is_dir():
            _flush_folder(file)
        elif file.is_file():
            _flush_file(file, mode=0o666 & ~mask)
    if new.is_dir() and path.is_dir():
        _swap_folders(new, path)
    else:
        os.replace(new, path)
        _flush_folder(path.parent)


def _flush_file(file: Path, *, mode: int) -> None:
    # Windows flushes only what may be written to. Opened before the mode is set: it may forbid that.
    descriptor = os.open(file, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        file.chmod(mode)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_folder(folder: Path) -> None:
    """The names in it, where the system flushes folders."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows opens no folder; elsewhere some may be written to and not read
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FLUSH:
            raise
    finally:
        os.close(descriptor)


def bring_back(new: Path, path: Path) -> None:
    """The folder that `move_into_place(new, path)` was about to replace gets its name back, if a kill took it away."""
    if _retired(new).is_dir() and not path.exists():
        os.replace(_retired(new), path)


def remove(path: Path) -> None:
    """A file or a folder with all its files, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_at_once(folder: Path) -> None:
    """Removes a folder that must not stay in part under its name when the process is killed meanwhile."""
    leaving = temporary_path(folder)
    os.replace(folder, leaving)
    shutil.rmtree(leaving)


def _swap_folders(new: Path, path: Path) -> None:
    """Puts the folder `new` in the place of the folder `path`, in one step where the system has one.

    Where it has none, the old folder is called NEW.old for a moment: `bring_back` finds it after a kill.
    """
    whole = new if new.suffix == ".tmp" else new.with_name(f".{new.name}.whole.tmp")
    if whole != new:  # what has the old folder's files must not be taken for one that grows
        remove(whole)
        os.replace(new, whole)
    try:
        if not exchange(whole, path):
            _replace_in_two_steps(whole, path, retired=_retired(new))
    except OSError:
        os.replace(whole, new)
        raise
    _flush_folder(path.parent)  # before the old one is gone
    shutil.rmtree(whole)


def _replace_in_two_steps(whole: Path, path: Path, *, retired: Path) -> None:
    """Afterwards the old folder is called `whole`, as after an exchange."""
    remove(retired)
    os.replace(path, retired)
    try:
        os.replace(whole, path)
    except OSError:
        os.replace(retired, path)
        raise
    os.replace(retired, whole)


def exchange(first: Path, second: Path) -> bool:
    """Exchanges the names of two folders in one step; False, with nothing done, where the system cannot."""
    if sys.platform != "linux":
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # an old C library
        return False
    return rename(_HERE, os.fsencode(first), _HERE, os.fsencode(second), _EXCHANGE) == 0


def _retired(new: Path) -> Path:
    return new.with_name(f"{new.name}.old")


@cache
def _machine() -> str:
    """Tells apart machines and containers that share a disk: numbers of processes are of one of them."""
    known = [os.uname().nodename if sys.platform != "win32" else os.environ.get("COMPUTERNAME", "")]
    boot, processes = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    if boot.is_file() and processes.exists():
        known += [boot.read_text().strip(), os.readlink(processes)]
    return hashlib.blake2s("|".join(known).encode(), digest_size=4).hexdigest()


def _is_alive(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True
