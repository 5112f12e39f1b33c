"""Real processes that SIGKILL ends, in every phase of a cut: `last.ckpt` goes on to the weights of a run that lived."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from resume_runs import assert_same_run, prepare, run

pytestmark = [
    pytest.mark.resume,
    pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch"),
]

TESTS = Path(__file__).parent
STEP = "lightning_moe.training.module:LanguageModelModule.training_step"
WRITE = "torch:save"
BETWEEN = "lightning_moe.surgery.pruner:apply_plan"
INSIDE = "lightning_moe.surgery.cut:cut_layer"
FOREIGN = "tiny_runs:ForeignModule.training_step"


def start(mode, folder, target, call):
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(TESTS / "resume_runs.py"), mode, str(folder), target, str(call)]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": paths}, stderr=subprocess.DEVNULL)


def killed_like(mode, folder, target, call):
    """A child that kills itself; afterwards there is a checkpoint of a few steps."""
    assert start(mode, folder, target, call).wait(timeout=120) == -signal.SIGKILL
    return folder / "killed" / "last.ckpt"


def goes_on(mode, folder, path, *, max_steps=6):
    resumed = run(mode, folder, name="killed", resume=path, max_steps=max_steps)
    assert_same_run(resumed, run(mode, folder, name="whole", max_steps=max_steps))


def steps_of(path):
    return torch.load(path, weights_only=True)["global_step"]


def test_killed_between_calibration_and_surgery(tmp_path):
    path = killed_like("nf4", prepare(tmp_path), BETWEEN, 2)
    assert steps_of(path) == 4
    goes_on("nf4", tmp_path, path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "target", "call", "steps"),
    [
        pytest.param("experts", INSIDE, 4, 2, id="one layer cut, the other not"),
        pytest.param("whole", STEP, 5, 4, id="after a cut, before the next checkpoint"),
        pytest.param("window", STEP, 4, 3, id="between two cuts"),
        pytest.param("one_shot", STEP, 3, 2, id="after a cut before training"),
        pytest.param("one_shot", WRITE, 3, 2, id="while last.ckpt is written"),
        pytest.param("accumulated", STEP, 6, 2, id="between micro-batches"),
        pytest.param("foreign", FOREIGN, 5, 4, id="random numbers, at an epoch's end"),
        pytest.param("distilled", STEP, 5, 4, id="with a teacher"),
    ],
)
def test_killed_in_any_phase(tmp_path, mode, target, call, steps):
    path = killed_like(mode, prepare(tmp_path), target, call)
    assert steps_of(path) == steps
    goes_on(mode, tmp_path, path)


@pytest.mark.slow
def test_killed_from_outside_at_any_time(tmp_path):
    child, path = start("nf4", prepare(tmp_path), "", 0), tmp_path / "killed" / "last.ckpt"
    deadline = time.monotonic() + 100
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(random.uniform(0, 1.5))
    child.kill()
    assert child.wait() == -signal.SIGKILL
    goes_on("nf4", tmp_path, path, max_steps=steps_of(path) + 2)


def test_killed_before_the_first_checkpoint_there_is_none(tmp_path):
    """Lightning's `ckpt_path="last"` then starts from the beginning, with a warning."""
    prepare(tmp_path)
    with pytest.warns(UserWarning, match="there is no last checkpoint available"):
        resumed = run("nf4", tmp_path, name="killed", resume="last", max_steps=2)
    assert_same_run(resumed, run("nf4", tmp_path, name="whole", max_steps=2))
