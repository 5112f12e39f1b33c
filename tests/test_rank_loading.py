"""Pruned folders in several processes: each reads its share under FSDP2, all map one copy under DDP; numbers stay."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from random_plans import random_plan
from tiny_models import tiny_model

from lightning_moe.export.huggingface import save_ragged
from lightning_moe.models.loading import load_model
from lightning_moe.quantization.linears import quantize_model
from lightning_moe.surgery.cut import apply_plan

pytestmark = pytest.mark.multiprocess


def run(script, folder, *cases):
    """Runs a script of this folder, which starts its other process itself; results by rank."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name(script)), str(folder), *cases]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{cases[0]}_rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A ragged folder in 16 bit and the same in NF4, of experts of unequal width and one that is gone."""
    path = tmp_path_factory.mktemp("rank_loading")
    model = tiny_model("qwen2_moe", dtype=torch.bfloat16).float()
    apply_plan(model, plan=random_plan(model, evicted=[[0], []]))
    save_ragged(model, path / "ragged")
    quantize_model(model)
    save_ragged(model, path / "nf4")
    return path


def check_equal(one, other):
    assert one["losses"] == other["losses"]
    for key in ("parameters", "trained"):
        assert one[key].keys() == other[key].keys()
        for name, value in one[key].items():
            assert torch.equal(value, other[key][name]), name


def test_shares_of_an_nf4_folder_equal_the_whole_load_and_resume(folder):
    for rank in run("rank_loading_run.py", folder, "fsdp2-nf4-nf4+resumed", "fsdp2-nf4-nf4-whole"):
        shares, whole = rank["fsdp2-nf4-nf4"], rank["fsdp2-nf4-nf4-whole"]
        assert (shares["waiting"] > 0, whole["waiting"]) == (True, 0)
        check_equal(shares, whole)
        resumed = rank["fsdp2-nf4-nf4+resumed"]
        assert resumed["waiting"] > 0
        assert resumed["losses"] == whole["losses"][2:]
        for name, value in whole["trained"].items():
            assert torch.equal(value, resumed["trained"][name]), name
    assert load_model(str(folder / "exports" / "merged_nf4")).config.num_hidden_layers == 2


@pytest.mark.slow
def test_shares_of_a_model_that_is_trained_whole(folder):
    """Without callbacks that cut or pack, every module of ours reads its share."""
    for rank in run("rank_loading_run.py", folder, "fsdp2-ragged-all", "fsdp2-ragged-all-whole"):
        check_equal(rank["fsdp2-ragged-all"], rank["fsdp2-ragged-all-whole"])


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["nf4", "none"])
def test_shares_of_a_ragged_folder_equal_the_whole_load(folder, quantize):
    """In 4 bit each layer is packed after it is read."""
    case = f"fsdp2-ragged-{quantize}"
    for rank in run("rank_loading_run.py", folder, f"{case}+resumed", f"{case}-whole"):
        assert (rank[case]["waiting"] > 0, rank[f"{case}-whole"]["waiting"]) == (True, 0)
        check_equal(rank[case], rank[f"{case}-whole"])
        assert rank[f"{case}+resumed"]["losses"] == rank[case]["losses"][2:]


@pytest.mark.slow
def test_ddp_maps_what_it_loaded_and_trains_to_the_same(folder):
    """Only trained parameters and the norms' copies are sent to all as DDP begins, so maps stay maps."""
    one, other = run("rank_loading_run.py", folder, "ddp-nf4-nf4")
    shares = run("rank_loading_run.py", folder, "fsdp2-nf4-nf4")
    for rank, sharded in zip((one, other), shares, strict=True):
        found = rank["ddp-nf4-nf4"]
        assert set(found["sent"]) == set(found["trained"])
        assert found["losses"] == pytest.approx(sharded["fsdp2-nf4-nf4"]["losses"], abs=1e-6)
        for name, value in found["trained"].items():
            assert torch.equal(value, one["ddp-nf4-nf4"]["trained"][name]), name


@pytest.mark.slow
def test_a_run_ends_for_all_where_one_process_sees_another_folder(folder):
    """Nobody waits for the one that failed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    script = str(Path(__file__).with_name("rank_loading_run.py"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29631"]
    command = [*torchrun, script, str(folder), "fsdp2-by_rank-nf4"]
    for rank, name in enumerate(("ragged", "nf4")):
        (folder / f"by_rank{rank}").symlink_to(folder / name)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if "ValueError" in line and "is not the same model for" in line]
    assert len(lines) >= 2
