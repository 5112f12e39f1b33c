"""Every mode, stopped after every step: the resumed run ends with the same weights, moments and batches, bit by bit."""

import pytest
from resume_runs import MODES, assert_same_run, prepare, run

pytestmark = [
    pytest.mark.resume,
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch"),
]

# Checkpoints before, at (nothing between the step and the cut) and after the cuts at steps 1 and 4.
QUICK = {"one_shot": (3,), "whole": (1, 3), "nf4": (1, 4), "experts": (2,), "window": (4,), "foreign": (4,)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("modes"))


def checkpoint(folder, mode, step):
    (file,) = (folder / mode).glob(f"*step={step}.ckpt")
    return file


def resume_equals(folder, mode, steps):
    expected = run(mode, folder, name=mode)
    for step in steps:
        resumed = run(mode, folder, name="resumed", resume=checkpoint(folder, mode, step))
        assert_same_run(resumed, expected)


@pytest.mark.parametrize("mode", QUICK)
def test_a_resumed_run_is_the_uninterrupted_one(folder, mode):
    resume_equals(folder, mode, QUICK[mode])


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_from_every_step_a_resumed_run_is_the_uninterrupted_one(folder, mode):
    steps = (4,) if mode.startswith("foreign") else range(1, 6)
    resume_equals(folder, mode, steps)
