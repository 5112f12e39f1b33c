"""What a user sees of signals, of memory that is not there and of processes that were ended."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lightning_moe import cli, signals
from lightning_moe.failures import failure_of_machine

pytestmark = pytest.mark.fault

ROOT = Path(__file__).parents[1]


def stopped(capsys, monkeypatch, *, command, error=None, number=None):
    """Exit code and last line of a command that meets an error or a signal."""

    def meets(*_):
        if number is not None:
            os.kill(os.getpid(), number)
            time.sleep(5)
        raise error

    monkeypatch.setattr(cli, "train" if command == "fit" else "run_command", meets)
    with pytest.raises(SystemExit) as ended:
        cli.main([command])
    told = capsys.readouterr().err
    assert "Traceback" not in told
    assert told.count("\n") == 1
    return ended.value.code, told


@pytest.mark.parametrize(("command", "goes_on"), [("plan", "."), ("prune", "; the same command goes on where it")])
def test_sigterm_is_one_line(command, goes_on, capsys, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    code, told = stopped(capsys, monkeypatch, command=command, number=signal.SIGTERM)
    assert code == 128 + signal.SIGTERM
    assert f"{command}: terminated{goes_on}" in told
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_forked_worker_ends_without_a_word():
    with signals.signals_raise():
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        worker.start()
        worker.terminate()
        worker.join()
    assert worker.exitcode == -signal.SIGTERM


def test_lightnings_silent_exit_after_an_interruption_is_told(capsys, monkeypatch):
    silent = SystemExit(1)
    silent.__context__ = KeyboardInterrupt()
    code, told = stopped(capsys, monkeypatch, command="fit", error=silent)
    assert code == 130
    assert "fit: interrupted; with a checkpoint (ModelCheckpoint), `--ckpt_path last` goes on from it." in told


def test_an_exit_of_the_parser_stays(capsys, monkeypatch):
    monkeypatch.setattr(cli, "run_command", lambda *_: sys.exit(3))
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan"])
    assert ended.value.code == 3
    assert capsys.readouterr().err == ""


def test_handlers_of_others_stay(monkeypatch):
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with signals.signals_raise():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        monkeypatch.setenv("SLURM_JOB_ID", "1")
        with signals.signals_raise():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("argv", "orig_argv", "ours"),
    [
        (["-m"], ["python", "-m", "lightning_moe", "plan"], True),
        (["/bin/lightning-moe"], ["python", "/bin/lightning-moe"], True),
        (["-m"], ["python", "-m", "pytest", "lightning_moe.py"], False),
        (["train.py"], ["python", "train.py"], False),
        ([], [], False),
    ],
)
def test_a_program_of_somebody_else_keeps_its_handlers(argv, orig_argv, ours, monkeypatch):
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", orig_argv)
    assert signals.is_program() == ours


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("number", "how"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_signals_during_the_imports_are_one_line(number, how, tmp_path):
    (tmp_path / "torch.py").write_text("import time\ntime.sleep(600)\n")  # imports that last until the signal comes
    command, path = [sys.executable, "-m", "lightning_moe", "plan"], {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=os.environ | path)
    status = Path(f"/proc/{process.pid}/status")
    while not int(re.search(r"SigCgt:\s*(\w+)", status.read_text())[1], 16) & 1 << (signal.SIGTERM - 1):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    _, told = process.communicate(timeout=600)
    assert process.returncode == 128 + number
    assert told == f"python -m lightning_moe: {how} while it was starting.\n"


def test_memory_that_is_not_there_is_one_line(capsys, monkeypatch):
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**50)
    code, told = stopped(capsys, monkeypatch, command="calibrate", error=error.value)
    assert code == 1
    assert "calibrate: not enough memory for 4.5e+06 GB more. Take smaller batches or shorter sequences" in told


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (MemoryError(), r"^not enough memory\. Take smaller batches"),
        (OSError(12, "Cannot allocate memory"), r"^not enough memory\. "),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
            r"^the GPU is out of memory: CUDA",
        ),
        (RuntimeError("DataLoader worker (pid(s) 17, 18) exited unexpectedly"), r"loads data \(pid 17, 18\) was ended"),
        (RuntimeError("DataLoader worker (pid 17) is killed by signal: Killed. "), r"loads data \(pid 17\) was ended"),
        (RuntimeError("[gloo/pair.cc:534] Connection closed by peer [::1]:4"), r"another process of the run broke"),
        (
            RuntimeError("can't start new thread"),
            r"no more processes or threads: can't start new thread\. Too little memory",
        ),
        (
            SystemError("error return without exception set"),
            r"^a library failed without saying why, as some do where no",
        ),
    ],
)
def test_what_the_machine_does_is_told(error, match):
    assert re.search(match, failure_of_machine(error))


def test_a_loader_that_ends_while_an_error_is_told_does_not_hide_it(capsys, monkeypatch):
    """PyTorch raises from its handler of SIGCHLD, which comes once for every process that ended."""

    def raises(*_):
        raise RuntimeError("DataLoader worker (pid 18) is killed by signal: Killed. ")

    def told(error, **_):
        os.kill(os.getpid(), signal.SIGCHLD)
        return failure_of_machine(error), 1

    before = signal.signal(signal.SIGCHLD, raises)
    try:
        monkeypatch.setattr(cli, "_told", told)
        error = RuntimeError("DataLoader worker (pid 17) is killed by signal: Killed. ")
        code, said = stopped(capsys, monkeypatch, command="calibrate", error=error)
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert code == 1
    assert "(pid 17) was ended from outside" in said


def test_what_a_library_took_for_bad_input_is_told_as_what_it_is():
    error = ValueError("Problem with given class_path 'Corpus'")
    error.__context__ = MemoryError()
    assert failure_of_machine(error).startswith("not enough memory.")


@pytest.mark.skipif(sys.platform != "linux", reason="limits its memory")
def test_what_the_parser_says_without_memory_is_told_as_what_it_is():
    program = (
        "import resource; from jsonargparse import ArgumentError; from lightning_moe import cli\n"
        "def meets(*_):\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (used, used))\n"
        "    raise ArgumentError(None, \"Option 'source' is not accepted\")\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize() + 2**23\n"
        "cli.run_command = meets\n"
        "cli.main(['plan'])\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith("python -m lightning_moe: plan: not enough memory. Take smaller batches")


@pytest.mark.parametrize(
    "error", [RuntimeError("shape mismatch"), ValueError("memory"), KeyError("x"), SystemExit(1), SystemError("x")]
)
def test_errors_of_a_program_keep_their_traceback(error, monkeypatch):
    assert failure_of_machine(error) is None
    if isinstance(error, RuntimeError):

        def meets(*_):
            raise error

        monkeypatch.setattr(cli, "run_command", meets)
        with pytest.raises(RuntimeError, match="shape mismatch"):
            cli.main(["plan"])
