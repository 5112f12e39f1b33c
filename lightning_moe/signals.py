"""Ctrl-C and SIGTERM while a command of ours starts or runs: one line, and the exit code that shells expect.

Nothing but the standard library is imported here: this runs before everything else.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# Exit code of a process that a signal ends is this plus the signal's number.
SIGNAL_CODE = 128
_PROGRAM = "python -m lightning_moe"
_AGAIN_S = 0.02


class Terminated(BaseException):
    """SIGTERM came while a command ran. No `KeyboardInterrupt`: Lightning ends those by itself, without a word."""


def stop_while_starting() -> None:
    """Until a command begins, SIGINT and SIGTERM end the process with one line: importing takes seconds.

    Nothing is changed in a program of somebody else that imports this package.
    """
    if is_program() and threading.current_thread() is threading.main_thread():
        stop_at_once()


def stop_at_once() -> None:
    """From now on SIGINT and SIGTERM end the process with one line."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop_at_once)


def is_program() -> bool:
    """Whether this process was started as `python -m lightning_moe` or `lightning-moe`."""
    name = os.path.basename(sys.argv[0]).removesuffix(".exe") if sys.argv else ""
    as_module = name == "-m" and "lightning_moe" in sys.orig_argv[:4]
    return as_module or name == "lightning-moe"


def _stop_at_once(number: int, frame: FrameType | None) -> None:
    """Not by an exception: while modules are imported, those that are half there could catch it."""
    how = "interrupted" if number == signal.SIGINT else "terminated"
    os.write(2, f"{_PROGRAM}: {how} while it was starting.\n".encode())
    os._exit(SIGNAL_CODE + number)


@contextmanager
def signals_raise() -> Iterator[None]:
    """Inside the block SIGINT raises KeyboardInterrupt and SIGTERM raises Terminated.

    A SIGTERM that the caller ignores or handles by itself stays as it is; so does one that SLURM sends before it
    requeues a job, which Lightning answers.

    Raises:
        Terminated: SIGTERM came.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    ours = (signal.SIG_DFL, _stop_at_once)
    if before[signal.SIGINT] is _stop_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if before[signal.SIGTERM] in ours:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if "SLURM_JOB_ID" in os.environ else _raise_terminated)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def forget_children() -> None:
    """From now on the end of a child raises nothing. PyTorch's handler does, wherever the program is by then."""
    if sys.platform != "win32" and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _raise_terminated(number: int, frame: FrameType | None) -> None:
    if _fork.running:
        _fork.terminated = True
        return
    signal.signal(number, signal.SIG_DFL)  # a second one ends the process, should a library swallow the exception
    raise Terminated


class _Fork:
    """What happened while this process forks: Python drops every exception that is raised then."""

    running = False
    terminated = False


_fork = _Fork()


def _ours() -> bool:
    return signal.getsignal(signal.SIGTERM) is _raise_terminated


def _hold() -> None:
    if _ours():
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        _fork.running = True


def _let_go() -> None:
    if not _fork.running:
        return
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    _fork.running = False
    if _fork.terminated:  # through another thread, whose mask is its own
        _fork.terminated = False
        threading.Timer(_AGAIN_S, os.kill, (os.getpid(), signal.SIGTERM)).start()


def _as_usual() -> None:
    """In a worker that was forked: SIGTERM, by which pools end their workers, ends it without a word."""
    _fork.running = _fork.terminated = False
    if _ours():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


if sys.platform != "win32":
    # Held meanwhile: Python forgets a signal that comes to a child before it is ready.
    os.register_at_fork(before=_hold, after_in_parent=_let_go, after_in_child=_as_usual)
