"""Faults of the machine: a few cases of the campaign, and what the campaign takes for a loss."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from faults import cases
from faults.processes import Ended
from faults.stages import STAGES, Baselines

pytestmark = pytest.mark.fault

SCRIPT = Path(__file__).parents[1] / "scripts" / "fault_campaign.py"
CHOSEN = (
    "calibrate/SIGKILL/at 0.493, half a file",
    "prune/SIGKILL/at 1.000, half a file",
    "quantise/SIGKILL/at 0.667, half a file",
    "pack/SIGKILL/at 0.753, half a file",
    "calibrate/SIGTERM/at 1.000",
    "plan/SIGTERM/at 0.000",
    "calibrate/full disk/from the start",
    "prune/full disk/at 0.522",
    "pack/read-only folder/out",
    "plan/truncated file/statistics.safetensors, half",
    "prune/damaged leftovers/cut",
    "calibrate/killed loader/second batch",
    "calibrate/text/of another tokenizer",
)


def test_nothing_is_lost_in_a_few_cases(tmp_path):
    command = [sys.executable, str(SCRIPT), "--quick", "--json", str(tmp_path / "faults.json"), "--work", str(tmp_path)]
    patterns = [name.replace("[", "[[]") for name in CHOSEN]
    ended = subprocess.run([*command, "--only", *patterns], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    bars = {line.partition(":")[0] for line in ended.stderr.replace("\r", "\n").splitlines() if line.strip()}
    assert bars == {"Undisturbed runs", "Cases"}  # none of the libraries'
    found = json.loads((tmp_path / "faults.json").read_text())
    assert (found["cases"], found["survived"], found["lost"]) == (len(found["results"]), len(found["results"]), 0)
    assert {row["case"] for row in found["results"]} | set(left_out(found)) == set(CHOSEN)
    assert found["findings"] == []
    assert os.listdir(tmp_path) == ["faults.json"]


def left_out(found):
    """Chosen cases that this machine cannot have."""
    return [name for name in CHOSEN if name.split("/")[1] in found["left_out"]]


@pytest.fixture
def folder(tmp_path):
    """A case of `plan` whose undisturbed run and older run are made up."""
    baselines, stage = Baselines(root=tmp_path), STAGES["plan"]
    for made, text in ((baselines.folder("plan"), "new"), (baselines.older("plan"), "old")):
        (made / "out").mkdir(parents=True)
        (made / "out" / "statistics.safetensors").write_text("sums")
        (made / "out" / "plan.json").write_text(json.dumps({"plan": text, "seconds": len(str(made))}))
    baselines.new_folder(baselines.case_folder(0), stage=stage, older=True)
    return cases.CaseFolder(path=baselines.case_folder(0), stage=stage, baselines=baselines)


def problems(folder, *, change, code=1):
    before = cases.snapshot(folder.path)
    change(folder.path / "out")
    ended = Ended(code=code, output="")
    return cases._problems_left(folder, before=before, ended=ended, may_differ=False)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda out: None, 1),
        (lambda out: (out / "plan.json").write_text('{"plan": "new", "seconds": 9}'), 0),
        (lambda out: (out / "plan.json").write_text('{"plan": "new", "seconds": 9}'), -9),
        (lambda out: (out / ".plan.json.0.tmp").write_text("hal"), -9),
    ],
)
def test_what_is_no_loss(change, code, folder):
    assert problems(folder, change=change, code=code) == []


@pytest.mark.parametrize(
    ("change", "code", "what"),
    [
        (lambda out: None, 0, "'out/plan.json' is neither whole nor as it was"),
        (lambda out: (out / "plan.json").write_text('{"pl'), -9, "'out/plan.json' is neither whole nor as it was"),
        (lambda out: (out / "plan.json").unlink(), -9, "'out/plan.json' is neither whole nor as it was"),
        (lambda out: (out / "statistics.safetensors").write_text("sum"), 1, "'out/statistics.safetensors', which lay"),
        (lambda out: (out / "statistics.safetensors").unlink(), 1, "'out/statistics.safetensors', which lay there, is"),
        (lambda out: (out / "plan2.json").write_text("{}"), 1, "'out/plan2.json' is new"),
    ],
)
def test_what_is_a_loss(change, code, what, folder):
    assert [problem for problem in problems(folder, change=change, code=code) if problem.startswith(what)]


@pytest.mark.parametrize(
    ("output", "code", "survives"),
    [
        ("log\npython -m lightning_moe: plan: 'x' is damaged.\n", 1, True),
        ("python -m lightning_moe: plan: 'y' is damaged.\n", 1, False),
        ("python -m lightning_moe: plan: 'x'.\nmore\n", 1, False),
        ("Traceback (most recent call last)\npython -m lightning_moe: plan: 'x'.\n", 1, False),
        ("python -m lightning_moe: plan: 'x'.\n", -11, False),
        ("python -m lightning_moe: plan: 'x'.\n", 0, False),
        ("", 1, False),
    ],
)
def test_what_a_refusal_is(output, code, survives):
    assert (cases.refused("'x'")(Ended(code=code, output=output)) is None) == survives


def test_a_process_that_had_to_be_ended_was_not_killed_by_the_fault():
    assert cases.killed(Ended(code=-9, output="")) is None
    assert cases.killed(Ended(code=-9, output="", timed_out=True)) is not None
    assert cases.completed(Ended(code=0, output="")) is None
    assert cases.completed(Ended(code=3, output="x")) == "ended with code 3: x"
