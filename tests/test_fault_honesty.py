"""The campaign cannot be fooled: faults that miss, files half there, writers that know no temporary names."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from faults import cases, kills, processes, runner
from faults.places import at_place, was_missed
from faults.processes import Ended, kill_all, start_function
from faults.report import check_writable
from faults.stages import STAGES, Baselines
from safetensors.torch import save_file

from lightning_moe.signals import Terminated, signals_raise

pytestmark = pytest.mark.fault

SCRIPT = Path(__file__).parents[1] / "scripts" / "fault_campaign.py"
LONG_S = 600  # nothing waits so long unless something hangs


@pytest.fixture
def folder(tmp_path):
    """A case of `recover` whose undisturbed run and older run are made up."""
    baselines, stage = Baselines(root=tmp_path), STAGES["recover"]
    for made, text in ((baselines.folder("recover"), "new"), (baselines.older("recover"), "old")):
        for name in stage.outputs:
            file = made / name if name.endswith(".json") else made / name / "config.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"of": text}))
    baselines.new_folder(baselines.case_folder(0), stage=stage, older=True)
    return cases.CaseFolder(path=baselines.case_folder(0), stage=stage, baselines=baselines)


def problems(folder, *, change, code, may_differ=False):
    before = cases.snapshot(folder.path)
    change(folder.path / "out")
    ended = Ended(code=code, output="")
    return cases._problems_left(folder, before=before, ended=ended, may_differ=may_differ)


def checkpoint(out, *, num_bytes=None):
    file = out / "checkpoints" / "last.ckpt"
    file.parent.mkdir()
    torch.save({"step": 1}, file)
    os.truncate(file, file.stat().st_size if num_bytes is None else num_bytes)


@pytest.mark.parametrize("num_bytes", [0, 100])
def test_half_a_checkpoint_is_a_loss(num_bytes, folder):
    assert problems(folder, change=lambda out: checkpoint(out, num_bytes=num_bytes), code=-9) == [
        "'out/checkpoints/last.ckpt' is half-made"
    ]


def test_a_whole_checkpoint_is_none(folder):
    assert problems(folder, change=checkpoint, code=-9) == []


def another(text, *names):
    def change(out):
        for name in names:
            (out / "recovered" / "adapter" / name).write_text(text)

    return change


@pytest.mark.parametrize(
    ("change", "lost"),
    [
        (another('{"of": "another"}', "config.json"), False),
        (another('{"of": "ano', "config.json"), True),
        (another("", "config.json"), True),
        (another('{"of": "another"}', "config.json", "left.json"), True),
    ],
)
def test_another_output_has_to_be_whole(change, lost, folder):
    def all_of_another(out):
        for file in [*(out / "recovered").rglob("*.json"), *(out / "report").rglob("*.json")]:
            file.write_text('{"of": "another"}')
        change(out)

    found = problems(folder, change=all_of_another, code=0, may_differ=True)
    assert found == (["'out/recovered/adapter' is neither whole nor as it was before"] if lost else [])


@pytest.mark.parametrize(("number", "missed"), [(1, False), (2, True)])
def test_a_fault_that_never_struck_is_known(number, missed, tmp_path):
    def write_two():
        for name in "ab":
            Path(name).write_text(name)

    struck = at_place(number, lambda *_: None)
    assert start_function(write_two, folder=tmp_path, child=struck).end().code == 0
    assert was_missed(tmp_path) == missed
    assert not was_missed(tmp_path)


def save_zeros(file):
    """Opens the file where Python does not see it."""
    save_file({"a": torch.zeros(10**5)}, file)


@pytest.mark.parametrize(("number", "write"), [(1, lambda file: file.write_bytes(bytes(10**6))), (0, save_zeros)])
def test_a_writer_without_a_temporary_name_is_ended_half_way(number, write, tmp_path):
    file = tmp_path / "plan.safetensors"

    def run():
        (tmp_path / "folder").mkdir()
        write(file)

    ended = start_function(run, folder=tmp_path, child=kills._killed_in_a_write(number, last=False)).end()
    assert kills._torn(ended) is None
    assert not file.exists() or file.stat().st_size <= kills._TORN_BYTES
    assert number == 0 or file.stat().st_size == kills._TORN_BYTES


def test_sigterm_that_is_ignored_is_a_loss():
    stopped = cases.refused("terminated", codes=(143,))
    assert stopped(Ended(code=0, output="python -m lightning_moe: plan: terminated.\n")) is not None


def test_files_are_tried_before_the_work(tmp_path):
    check_writable(tmp_path / "new" / "folder" / "faults.json", None)
    assert (tmp_path / "new" / "folder" / "faults.json").exists()
    with pytest.raises(OSError, match="Is a directory"):
        check_writable(tmp_path)


def sleep_long():
    time.sleep(LONG_S)


def is_there(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("alone", [False, True])
def test_processes_that_nobody_waits_for_any_more_are_ended(alone, tmp_path, monkeypatch):
    """Also one that had no time to become the first of its group."""
    if alone:
        monkeypatch.setattr(os, "setsid", lambda: None)
    running = start_function(sleep_long, folder=tmp_path)
    kill_all()
    assert not is_there(running.pid)
    assert processes._running == {}


def test_a_process_that_is_started_when_sigterm_comes_is_ended(tmp_path, monkeypatch):
    """The signal may come to another thread: what holds it back must not be this one's mask alone."""
    threading.Thread(target=time.sleep, args=(2,)).start()
    fork, pids = os.fork, []

    def forked():
        pids.append(fork())
        if pids[0]:
            os.kill(os.getpid(), signal.SIGTERM)
        return pids[0]

    monkeypatch.setattr(os, "fork", forked)
    with pytest.raises(Terminated), signals_raise():
        start_function(sleep_long, folder=tmp_path).end()
    assert set(processes._running) <= set(pids)
    kill_all()
    assert not is_there(pids[0])
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_what_a_process_leaves_behind_is_gone_when_it_has_ended(tmp_path):
    reader, writer = os.pipe()

    def leave():
        if not os.fork():
            sleep_long()

    assert start_function(leave, folder=tmp_path).end().code == 0
    os.close(writer)
    assert os.read(reader, 1) == b""  # nobody else has it open
    os.close(reader)


def test_an_interrupted_campaign_ends_its_workers_before_it_removes_their_folders(folder, monkeypatch):
    ended = []

    def results(*_, **__):
        try:
            yield 0, runner.Result(case=None, outcome=cases.Outcome(saw=""), seconds=0.0)
        finally:
            ended.append("workers")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "_results", results)
    monkeypatch.setattr(runner.tqdm, "update", interrupted)
    with pytest.raises(KeyboardInterrupt) as error:  # whose traceback keeps all frames alive
        runner.run_cases([None], baselines=folder.baselines, workers=1)
    assert ended == ["workers"]
    assert error.tb is not None


@pytest.mark.parametrize(("seconds", "limit_s"), [(0.5, 120), (9, 270)])
def test_a_slow_machine_is_given_its_time(seconds, limit_s, folder, monkeypatch):
    (folder.baselines.root / "recover.seconds").write_text(str(seconds))
    given = []
    monkeypatch.setattr(cases, "command", lambda *_, **options: given.append(options["limit_s"]))
    folder.command(["fit"])
    assert given == [limit_s]


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_an_ended_campaign_leaves_no_process_and_no_folder(tmp_path):
    command = [sys.executable, str(SCRIPT), "--only", "plan/", "--work", str(tmp_path), "--workers", "1"]
    campaign = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    wait_for(lambda: list(tmp_path.glob("faults_*/*.places")) or campaign.poll() is not None)
    campaign.send_signal(signal.SIGTERM)
    _, told = campaign.communicate(timeout=LONG_S)
    assert campaign.returncode == 130
    assert told.endswith("Interrupted: nothing was counted.\n")
    assert os.listdir(tmp_path) == []
    # Its workers are killed when it ends: that may take a moment on a machine that has other things to do.
    wait_for(lambda: not [pid for pid in os.listdir("/proc") if pid.isdigit() and str(tmp_path) in _words(pid)])


def wait_for(condition):
    """Until it holds: as long as a slow machine takes, and no longer."""
    until = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def _words(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""
