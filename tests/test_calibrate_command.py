"""The command `calibrate`: from every kind of folder, in a working folder, by one process or by several."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_runs import run, save_job
from interrupted_calibrations import interrupted, loaders
from random_plans import random_plan
from tiny_models import tiny_model
from torch import distributed

from lightning_moe.calibration.collector import collect_statistics
from lightning_moe.calibration.processes import ALONE
from lightning_moe.calibration.streamed import collect_streamed
from lightning_moe.commands import calibration
from lightning_moe.commands._shared import processes, resolve_device, working_folder
from lightning_moe.export.folders import open_folder
from lightning_moe.export.huggingface import save_ragged
from lightning_moe.models.loading import load_model
from lightning_moe.quantization.linears import quantize_model
from lightning_moe.records import CalibrationStatistics
from lightning_moe.surgery.cut import apply_plan


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Path:
    return save_job(tmp_path_factory.mktemp("job"))


def calibrate(job: Path, out: Path, *flags: object) -> None:
    run("calibrate", "--config", job / "data.yaml", "--model", job / "model", "--out", out, *flags)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3_grouped", "ernie4_5_moe"])
@pytest.mark.parametrize("packed", [False, True], ids=["ragged", "nf4"])
def test_cut_and_packed_folders_bit_for_bit(name, packed, tmp_path) -> None:
    model = tiny_model(name)
    apply_plan(model, plan=random_plan(model))
    if packed:
        quantize_model(model)
    save_ragged(model, tmp_path / "cut")
    expected = collect_statistics(load_model(str(tmp_path / "cut")), loaders=loaders(), progress=False)
    folder = open_folder(str(tmp_path / "cut"))
    found = collect_streamed(folder, loaders=loaders(), workspace=tmp_path / "work", progress=False)
    assert found.shape == expected.shape
    assert found.digest == expected.digest


def test_the_working_folder_is_gone_at_the_end(job, tmp_path) -> None:
    calibrate(job, tmp_path / "s.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]


def test_run_again_it_goes_on(job, tmp_path, capsys) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    calibrate(job, tmp_path / "whole")
    flags = ("--workspace", tmp_path / "work")
    with pytest.raises(SystemExit) as stopped, interrupted("outputs_renamed", stop):
        calibrate(job, tmp_path / "s", *flags)
    assert stopped.value.code == 130
    assert capsys.readouterr().err.endswith("calibrate: interrupted; the same command goes on where it stopped.\n")
    assert (tmp_path / "work" / "layer_00000.safetensors").is_file()
    assert not (tmp_path / "s").exists()
    calibrate(job, tmp_path / "s", *flags)
    assert (tmp_path / "s").read_bytes() == (tmp_path / "whole").read_bytes()
    assert not (tmp_path / "work").exists()


def test_gradients_that_fail_leave_the_forward_pass_done(job, tmp_path, monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("no memory for gradients")

    with monkeypatch.context() as patched:
        patched.setattr(calibration, "collect_gradients", fail)
        with pytest.raises(SystemExit):
            calibrate(job, tmp_path / "s", "--gradients", "true")
    assert (tmp_path / "s.partial" / "layer_00001.safetensors").is_file()
    with monkeypatch.context() as patched:
        patched.setattr(calibration.collect_streamed.__globals__["DecoderStep"], "run", fail)  # no layer runs again
        calibrate(job, tmp_path / "s", "--gradients", "true")
    assert "loss_snip" in CalibrationStatistics.load(tmp_path / "s").total()[0]


def test_where_the_working_folder_is() -> None:
    assert working_folder(None, out="runs/s.safetensors") == Path("runs/s.safetensors.partial")
    assert working_folder("elsewhere", out="runs/s.safetensors") == Path("elsewhere")


def test_without_torchrun_one_process_has_the_device(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (resolve_device("auto"), resolve_device("cpu"), resolve_device("cuda")) == ("cuda", "cpu", "cuda")
    with processes() as group:
        assert group == ALONE
    assert not distributed.is_initialized()


def test_each_process_of_torchrun_has_its_own_gpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert (resolve_device("auto"), resolve_device("cpu"), resolve_device("cuda")) == ("cuda:3", "cpu", "cuda:3")


def together(*arguments: object) -> subprocess.CompletedProcess[str]:
    """A program in two processes of torchrun."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    root = str(Path(__file__).parents[1])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": root}
    command = [*torchrun, *map(str, arguments)]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.multiprocess
def test_two_processes_give_what_one_gives(job, tmp_path) -> None:
    arguments = ("calibrate", "--config", job / "data.yaml", "--model", job / "model", "--data.batch_size", 2)
    done = together("-m", "lightning_moe", *arguments, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    run(*arguments, "--out", tmp_path / "one")
    found, expected = (CalibrationStatistics.load(tmp_path / name) for name in ("two", "one"))
    assert found.shape == expected.shape
    for mine, theirs in zip(found.corpora["a"], expected.corpora["a"], strict=True):
        for name in theirs:
            torch.testing.assert_close(mine[name], theirs[name], rtol=1e-5, atol=1e-6, msg=name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


BROKEN = """
import sys
from lightning_moe import cli
from lightning_moe.calibration import layer_walk
original = layer_walk.LayerWalk.run_layer
def broken(self, index, **options):
    if self.processes.rank == 1 and index == 1:
        raise ValueError("the second process fails in the second layer")
    original(self, index, **options)
layer_walk.LayerWalk.run_layer = broken
cli.main(sys.argv[1:])
"""


@pytest.mark.multiprocess
def test_an_error_of_one_process_ends_both(job, tmp_path) -> None:
    (tmp_path / "broken.py").write_text(BROKEN)
    data = ("--config", job / "data.yaml", "--data.batch_size", 2)
    done = together(tmp_path / "broken.py", "calibrate", *data, "--model", job / "model", "--out", tmp_path / "s")
    assert done.returncode
    assert done.stderr.count("calibrate: the second process fails in the second layer") == 2
    assert not (tmp_path / "s").exists()
    assert (tmp_path / "s.partial" / "layer_00000.safetensors").is_file()


def test_gradients_run_in_one_process() -> None:
    with pytest.raises(ValueError, match=r"`gradients` runs in one process, got 2. Start it without torchrun"):
        calibration._check_gradients(calibration.Processes(rank=0, size=2))
