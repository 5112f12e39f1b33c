"""A lock file: held by one process at a time, and free as soon as that process ends, however it ends."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Self


@dataclass(frozen=True, kw_only=True)
class Lock:
    """A lock that this process holds.

    Args:
        path: the file; it stays when the lock is released.
        descriptor: of the open file; None on systems without such locks.
    """

    path: Path
    descriptor: int | None

    @classmethod
    def take(cls, path: Path) -> Self:
        """Takes the lock; the file is made where there is none.

        Raises:
            BlockingIOError: another process holds it.
            OSError: the file cannot be made.
        """
        if sys.platform == "win32":
            return cls(path=path, descriptor=None)
        import fcntl

        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise
        return cls(path=path, descriptor=descriptor)

    def release(self) -> None:
        """Lets others have it."""
        if self.descriptor is not None:
            os.close(self.descriptor)
