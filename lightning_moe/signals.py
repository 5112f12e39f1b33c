"""Ctrl-C and SIGTERM while a command of ours starts or runs: one line, and the exit code that shells expect.

Nothing but the standard library is imported here: this runs before everything else.
"""

import os
import signal
import sys
import threading
import time
import weakref
from _thread import start_new_thread
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

# Exit code of a process that a signal ends is this plus the signal's number.
SIGNAL_CODE = 128
_PROGRAM = "python -m lightning_moe"
_AGAIN_S = 0.02


class Terminated(BaseException):
    """SIGTERM came while a command ran. No `KeyboardInterrupt`: Lightning ends those by itself, without a word."""


class Interrupted(KeyboardInterrupt):
    """SIGINT came while a command ran."""


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
    """Inside the block SIGINT raises Interrupted and SIGTERM raises Terminated.

    Again and again, until one gets out of the block: Python drops what is raised in a finalizer, a callback of a weak
    reference or a hook of a fork, and libraries have a bare `except:` here and there. An exception that dies inside the
    block was dropped.

    A SIGTERM that the caller ignores or handles by itself stays as it is; so does one that SLURM sends before it
    requeues a job, which Lightning answers.

    Raises:
        Terminated: SIGTERM came.
        Interrupted: SIGINT came.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    outer, hook = _block.is_active, sys.unraisablehook
    if before[signal.SIGINT] in (signal.default_int_handler, _stop_at_once):
        signal.signal(signal.SIGINT, _raise_interrupted)
    if before[signal.SIGTERM] in (signal.SIG_DFL, _stop_at_once):
        signal.signal(signal.SIGTERM, signal.SIG_DFL if "SLURM_JOB_ID" in os.environ else _raise_terminated)
    _block.count += 1
    _block.is_active, sys.unraisablehook = True, _without_word(hook)
    try:
        yield
    finally:
        _block.raised, _block.is_active, sys.unraisablehook = None, outer, hook
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def forget_children() -> None:
    """From now on the end of a child raises nothing. PyTorch's handler does, wherever the program is by then."""
    if sys.platform != "win32" and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


class _Block:
    """What `signals_raise` knows: how many there were, whether one is active, and what was raised in it last."""

    count = 0
    is_active = False
    raised: weakref.ref[BaseException] | None = None


class _Fork(threading.local):
    """What happens while a thread forks: whether it does, its mask before, and the signals that it got meanwhile."""

    is_running = False
    mask: set[int | signal.Signals] | None = None
    asked: frozenset[int] = frozenset()


_block = _Block()
_fork = _Fork()


def _raise_terminated(number: int, frame: FrameType | None) -> None:
    if isinstance(_on_its_way(), Terminated):  # a second one ends the process
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
    _raise(Terminated, number)


def _raise_interrupted(number: int, frame: FrameType | None) -> None:
    _raise(Interrupted, number)


def _raise(kind: type[BaseException], number: int) -> None:
    if _fork.is_running:  # what holds signals back must not be left half-way
        _fork.asked |= {number}
        return
    raise _watched(kind(), number)


def _watched(error: BaseException, number: int) -> BaseException:
    """If it dies inside the block, the signal is sent once more. No frame that is in its traceback has its name."""
    _block.raised = weakref.ref(error, lambda _: _again(number))
    return error


def _on_its_way() -> BaseException | None:
    return None if _block.raised is None else _block.raised()


def _again(number: int) -> None:
    """Sends a signal when that is over in which an exception is of no use.

    A thread of the plainest kind: one of `threading` takes locks, in which the next signal would leave it.
    """
    start_new_thread(_send, (number, _block.count))


def _send(number: int, block: int) -> None:
    time.sleep(_AGAIN_S)
    if _block.is_active and _block.count == block and _on_its_way() is None:
        os.kill(os.getpid(), number)


def _without_word(hook: "Callable[[UnraisableHookArgs], object]") -> "Callable[[UnraisableHookArgs], object]":
    """Tells of dropped exceptions as before, but for those that come again."""

    def tell(dropped: "UnraisableHookArgs") -> None:
        if not issubclass(dropped.exc_type, Terminated | Interrupted):
            hook(dropped)

    return tell


def _is_ours(number: int) -> bool:
    return signal.getsignal(number) in (_raise_terminated, _raise_interrupted)


def _hold() -> None:
    """Python forgets a signal that comes to a child before it is ready."""
    if _is_ours(signal.SIGTERM):
        _fork.is_running = True
        _fork.mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _let_go() -> None:
    if _fork.mask is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, _fork.mask)
    _fork.mask, _fork.is_running = None, False
    asked, _fork.asked = _fork.asked, frozenset()
    for number in asked:
        _again(number)


def _as_usual() -> None:
    """In a worker that was forked: SIGTERM, by which pools end their workers, ends it without a word."""
    _block.is_active, _block.raised, _fork.asked = False, None, frozenset()
    if _is_ours(signal.SIGTERM):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if _is_ours(signal.SIGINT):
        signal.signal(signal.SIGINT, signal.default_int_handler)
    _let_go()


if sys.platform != "win32":
    os.register_at_fork(before=_hold, after_in_parent=_let_go, after_in_child=_as_usual)
