"""SIGTERM and SIGINT reach a command wherever it is: also where Python or a library drops what is raised."""

import gc
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest

from lightning_moe import signals

pytestmark = [pytest.mark.fault, pytest.mark.skipif(sys.platform == "win32", reason="other signals, and no forks")]

ROOT = Path(__file__).parents[1]


def in_a_finalizer(meet):
    class Loader:
        def __del__(self):
            meet()

    Loader()


def in_a_weak_callback(meet):
    class Tensor:
        pass

    tensor = Tensor()
    _watch = weakref.ref(tensor, lambda _: meet())
    del tensor


def in_a_closed_generator(meet):
    def rows():
        try:
            yield 1
        finally:
            meet()

    made = rows()
    next(made)
    del made


def in_a_collection(meet):
    gc.callbacks.append(collected := lambda *_: meet())
    gc.collect(0)
    gc.callbacks.remove(collected)


def in_a_bare_except(meet):
    try:
        meet()
    except:  # noqa: E722
        return


def in_three_of_them(meet):
    in_a_bare_except(meet)
    in_a_finalizer(meet)
    in_a_weak_callback(meet)


PLACES = [in_a_finalizer, in_a_weak_callback, in_a_closed_generator, in_a_collection, in_a_bare_except]


def caught(run):
    """What gets out of a block in which signals raise."""
    with pytest.raises((signals.Terminated, KeyboardInterrupt)) as error, signals.signals_raise():
        run()
    return type(error.value)


def meet_and_wait(*numbers):
    """The exception ends it."""
    for number in numbers:
        os.kill(os.getpid(), number)
    time.sleep(60)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("swallow", [*PLACES, in_three_of_them])
def test_no_signal_is_swallowed_by_what_drops_exceptions(swallow, number, capfd):
    met = []

    def meet():
        met.append(number)
        if len(met) <= 3:
            meet_and_wait(number)

    def run():
        swallow(meet)
        time.sleep(60)

    assert caught(run) == (signals.Terminated if number == signal.SIGTERM else signals.Interrupted)
    assert met
    assert capfd.readouterr().err == ""  # nothing of "Exception ignored in"


def test_a_signal_that_was_heard_does_not_come_again():
    for _ in range(2):
        assert caught(lambda: meet_and_wait(signal.SIGTERM)) == signals.Terminated
        gc.collect()
    with signals.signals_raise():
        time.sleep(5 * signals._AGAIN_S)


def test_other_exceptions_that_are_dropped_are_told(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda dropped: told.append(dropped.exc_type))

    def meet():
        raise KeyError

    with signals.signals_raise():
        in_a_finalizer(meet)
    in_a_finalizer(meet)
    assert told == [KeyError, KeyError]


TWICE = """
import os, signal
from lightning_moe import signals
with signals.signals_raise():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
        print("not reached")
"""


def test_a_second_sigterm_ends_a_program_that_cleans_up():
    done = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGTERM, b"", b"")


def fork_and_wait():
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    time.sleep(60)


@pytest.mark.parametrize("held", [False, True])
def test_a_fork_leaves_the_signals_that_are_held_as_they_were(held, monkeypatch):
    """Also one in which Ctrl-C comes while they are being held."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM} if held else ())
    pthread_sigmask, interrupts = signal.pthread_sigmask, []

    def interrupted(how, mask):
        found = pthread_sigmask(how, mask)
        if mask == {signal.SIGTERM}:
            interrupts.append(os.kill(os.getpid(), signal.SIGINT))
        return found

    monkeypatch.setattr(signal, "pthread_sigmask", interrupted)
    try:
        assert caught(fork_and_wait) == signals.Interrupted
        assert interrupts
        assert (signal.SIGTERM in pthread_sigmask(signal.SIG_BLOCK, ())) == held
    finally:
        pthread_sigmask(signal.SIG_SETMASK, before)


IN_A_FORK = """
import os, signal, sys, threading, time
armed = []
# Runs after the library's own: hooks before a fork run from the last registered to the first.
os.register_at_fork(before=lambda: armed and os.kill(os.getpid(), armed.pop()))
from lightning_moe import signals
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
try:
    with signals.signals_raise():
        armed.append(signal.SIGTERM)
        if not os.fork():
            os._exit(0)
        time.sleep(20)
except signals.Terminated:
    print("told")
"""


def test_sigterm_in_the_middle_of_a_fork_is_not_lost():
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", IN_A_FORK]  # of a fork with threads
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert (done.stdout, done.stderr) == ("told\n", "")
