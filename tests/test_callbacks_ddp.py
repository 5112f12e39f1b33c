"""Compression, recovery and cuts on several processes: in step with each other, and with one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from recovery_runs import recover
from scheduled_runs import train
from tiny_runs import save_model, save_text
from transformers import AutoModelForCausalLM

from lightning_moe.evaluation.stages import load_stages
from lightning_moe.training.module import RecoveryModule

pytestmark = [
    pytest.mark.multiprocess,
    # The children's warnings are theirs; these are of the one process that their checkpoints are resumed in.
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]
# After 4 steps at a rate of 1e-2, sums of gradients in another order move a parameter by this much at most.
TOLERANCE = {"rtol": 0.0, "atol": 1e-4}


def run(script, *arguments):
    """Runs a script of this folder, which starts its other processes itself."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name(script)), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks")
    save_text(path, num_documents=18)
    save_model(path / "model")
    return path


@pytest.fixture(scope="module")
def alone(folder):
    return recover(folder, name="alone")[0]


def results(folder, name, *, size):
    return [torch.load(folder / f"{name}_rank{rank}.pt", weights_only=True) for rank in range(size)]


def as_rows(found):
    return [tuple(row) for row in found]


def check_ranks(ranks, *, alone):
    """Equal to each other bit by bit, resumed or not, and to one process within the tolerance."""
    first = ranks[0]["whole"]
    for rank in ranks:
        for key, value in alone["trained"].items():
            assert torch.equal(rank["whole"]["trained"][key], first["trained"][key]), key
            assert torch.equal(rank["resumed"]["trained"][key], ranks[0]["resumed"]["trained"][key]), key
            torch.testing.assert_close(rank["whole"]["trained"][key], value, msg=key, **TOLERANCE)
        assert rank["whole"]["nll"] == pytest.approx(alone["nll"], rel=1e-5)
        half = len(rank["whole"]["seen"]) // 2
        assert rank["resumed"]["seen"] == rank["whole"]["seen"][half:]
    shares = [as_rows(rank["whole"]["seen"]) for rank in ranks]
    assert sorted(row for share in shares for row in share) == sorted(as_rows(alone["seen"]))
    assert len(set().union(*shares)) == len(alone["seen"])


def check_resumed_exactly(ranks):
    """The same number of processes goes on to the same bits."""
    for key, value in ranks[0]["whole"]["trained"].items():
        assert torch.equal(ranks[0]["resumed"]["trained"][key], value), key


def check_exports(folder):
    """What rank 0 wrote was reloaded and compared there, and reported."""
    assert set(load_stages(folder / "rows")) == {"run", "run_merged"}
    assert AutoModelForCausalLM.from_pretrained(folder / "exports" / "merged_nf4").config.num_hidden_layers == 2


def check_resumed_alone(folder, name, *, whole):
    """One process goes on with what several wrote, and `load_from_checkpoint` reads it."""
    resumed, _ = recover(folder, name=f"{name}_alone", resume=str(folder / name / "step=2.ckpt"))
    module = RecoveryModule.load_from_checkpoint(str(folder / name / "step=4.ckpt"))
    loaded = dict(module.named_parameters())
    for key, value in whole["trained"].items():
        torch.testing.assert_close(resumed["trained"][key], value, msg=key, **TOLERANCE)
        assert torch.equal(loaded[key], value), key


@pytest.mark.slow
def test_ddp_equals_one_process_exports_and_resumes_anywhere(folder, alone):
    run("ranks_run.py", folder, "ddp", 2, 2)
    ranks = results(folder, "ddp2", size=2)
    check_ranks(ranks, alone=alone)
    check_resumed_exactly(ranks)
    check_exports(folder)
    check_resumed_alone(folder, "ddp2", whole=ranks[0]["whole"])


def test_fsdp2_equals_one_process_exports_and_resumes_anywhere(folder, alone):
    run("ranks_run.py", folder, "fsdp2", 2, 2)
    ranks = results(folder, "fsdp22", size=2)
    check_ranks(ranks, alone=alone)
    check_resumed_exactly(ranks)
    check_exports(folder)
    check_resumed_alone(folder, "fsdp22", whole=ranks[0]["whole"])
    for key, value in ranks[0]["whole"]["trained"].items():
        assert torch.equal(ranks[0]["from_shards"]["trained"][key], value), key


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_four_processes_equal_one_and_go_on_from_two(folder, alone, strategy):
    if not (folder / f"{strategy}2").exists():
        run("ranks_run.py", folder, strategy, 2, 2)
    run("ranks_run.py", folder, strategy, 4, 2)
    ranks = results(folder, f"{strategy}4", size=4)
    check_ranks(ranks, alone=alone)
    for key, value in ranks[0]["whole"]["trained"].items():
        torch.testing.assert_close(ranks[0]["resumed"]["trained"][key], value, msg=key, **TOLERANCE)


def test_cuts_in_training_keep_replicas_equal_and_equal_one_process(tmp_path):
    run("cuts_run.py", tmp_path)
    one, _ = train(tmp_path / "one")
    ranks = results(tmp_path, "cuts", size=2)
    first = ranks[0]["whole"]
    for rank in ranks:
        for key, value in one["parameters"].items():
            assert torch.equal(rank["whole"]["parameters"][key], first["parameters"][key]), key
            assert torch.equal(rank["resumed"]["parameters"][key], first["parameters"][key]), key
            torch.testing.assert_close(rank["whole"]["parameters"][key], value, msg=key, **TOLERANCE)
        assert rank["whole"]["plans"] == rank["resumed"]["plans"] == one["plans"]
        # A wrapper before, between and after the cuts; never two at a time, so no old hook is left.
        assert rank["whole"]["wrappers"] == 3
        assert set(rank["whole"]["alive"]) == {1}
        assert rank["whole"]["find_unused"] is True
    shares = [as_rows(rank["whole"]["seen"]) for rank in ranks]
    assert sorted(row for share in shares for row in share) == sorted(as_rows(one["seen"]))
