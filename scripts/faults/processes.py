"""One command of lightning_moe in a process of its own, forked so that the libraries are imported once."""

import ctypes
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from lightning_moe import cli
from lightning_moe.signals import stop_at_once

_ASKED = {signal.SIGINT, signal.SIGTERM}
_STEP_S = 0.01
_LEAVING_S = 20.0  # for processes that were killed, on a machine that has other things to do
LIMIT_S = 120.0
_ON_PARENTS_DEATH = 1  # PR_SET_PDEATHSIG


def end_with_parent() -> None:
    """This process is killed when the one that forked it ends, however that ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_ON_PARENTS_DEATH, signal.SIGKILL)


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a process ended.

    Args:
        code: its exit status; negative: the signal that ended it.
        output: what it wrote to standard output and standard error, as it came.
        timed_out: it was ended because it took too long.
    """

    code: int
    output: str
    timed_out: bool = False

    @property
    def last_line(self) -> str:
        """The last line that it wrote."""
        lines = [line.strip() for line in self.output.replace("\r", "\n").splitlines() if line.strip()]
        return lines[-1] if lines else ""


@dataclass(kw_only=True)
class Running:
    """A process that was started by `start`."""

    pid: int
    reader: int
    output: bytes = b""
    began: float = 0.0
    status: int | None = None

    def end(self, *, signals: Sequence[tuple[float, int]] = (), limit_s: float = LIMIT_S) -> Ended:
        """Waits for the end, and ends what the process has started.

        Args:
            signals: seconds after the start, and the signal that is sent then, the earliest first.
            limit_s: after so many seconds it is killed.
        """
        try:
            timed_out = self._wait(list(signals), limit_s=limit_s)
        finally:
            self.kill()
        text = self.output.decode("utf-8", errors="replace")
        return Ended(code=os.waitstatus_to_exitcode(self.status or 0), output=text, timed_out=timed_out)

    def kill(self) -> None:
        """Ends the process, if it is still there, and what it has left behind; afterwards none of them is there."""
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)  # it may have no group of its own yet
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        if self.status is None:
            self.status = os.waitpid(self.pid, 0)[1]
        until = time.monotonic() + _LEAVING_S
        while self._read(max(0.0, until - time.monotonic())):  # up to its end, when nobody holds the pipe open any more
            pass
        os.close(self.reader)
        _running.pop(self.pid, None)

    def _wait(self, due: list[tuple[float, int]], *, limit_s: float) -> bool:
        """Whether the process had to be killed."""
        timed_out = False
        while self.status is None:
            passed = time.monotonic() - self.began
            if due and passed >= due[0][0]:
                os.kill(self.pid, due.pop(0)[1])
            if passed > limit_s and not timed_out:
                timed_out = True
                os.kill(self.pid, signal.SIGKILL)
            if not self._read(_STEP_S):
                time.sleep(_STEP_S)  # it may have closed its end
            done, found = os.waitpid(self.pid, os.WNOHANG)
            self.status = found if done else None
        return timed_out

    def _read(self, wait_s: float) -> bool:
        """Whether there was something to read."""
        ready, _, _ = select.select([self.reader], [], [], wait_s)
        found = os.read(self.reader, 2**16) if ready else b""
        self.output += found
        return bool(found)


_running: dict[int, Running] = {}


def kill_all() -> None:
    """Ends every process that was started here and has not come to its end."""
    for running in list(_running.values()):
        running.kill()


def start(arguments: Sequence[str], *, folder: Path, child: Callable[[], None] | None = None) -> Running:
    """`python -m lightning_moe ARGUMENTS` with `folder` as its working directory.

    Args:
        arguments: subcommand and options.
        folder: working directory.
        child: called in the new process before the command begins: sets limits, breaks things.
    """
    return start_function(lambda: cli.main(list(arguments)), folder=folder, child=child)


def start_function(function: Callable[[], None], *, folder: Path, child: Callable[[], None] | None = None) -> Running:
    """A function in a process of its own, its output in a pipe: no file that a full disk would touch."""
    reader, writer = os.pipe()
    began = time.monotonic()
    with _held():  # until the child answers for itself, not as the campaign does; and until `kill_all` knows of it
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            _run(function, folder=folder, writer=writer, child=child)
        _running[pid] = Running(pid=pid, reader=reader, began=began)
        os.close(writer)
    return _running[pid]


@contextmanager
def _held() -> Iterator[None]:
    """SIGINT and SIGTERM come after the block, also those that another thread got, whose mask is its own."""
    asked: list[int] = []
    before = {number: signal.signal(number, lambda came, _: asked.append(came)) for number in _ASKED}
    signal.pthread_sigmask(signal.SIG_BLOCK, _ASKED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ASKED)
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for number in asked:
            signal.raise_signal(number)


def command(
    arguments: Sequence[str],
    *,
    folder: Path,
    child: Callable[[], None] | None = None,
    signals: Sequence[tuple[float, int]] = (),
    limit_s: float = LIMIT_S,
) -> Ended:
    """Runs one command to its end, see `start` and `Running.end`."""
    return start(arguments, folder=folder, child=child).end(signals=signals, limit_s=limit_s)


def _run(function: Callable[[], None], *, folder: Path, writer: int, child: Callable[[], None] | None) -> NoReturn:
    """The life of a child: it never returns into the campaign."""
    os.setsid()
    end_with_parent()
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (writer, 1), (writer, 2)):
        os.dup2(source, target)
    os.close(writer)
    sys.stdout = open(1, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
    os.chdir(folder)
    stop_at_once()  # as a program that imports its libraries
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ASKED)

    def begin() -> None:
        if child is not None:
            child()
        function()

    os._exit(exit_code(begin))


def exit_code(function: Callable[[], None]) -> int:
    """Runs a function as the interpreter runs a program: its exit code, after what there is to say was said."""
    code = 1
    try:
        function()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        if isinstance(stop.code, str):
            sys.stderr.write(f"{stop.code}\n")
    except BaseException:  # what the interpreter would print
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    return code & 0xFF
