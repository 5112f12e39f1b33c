"""`plan` with budgets, from the command line."""

import json

import pytest
import torch
from cli_runs import run
from sharded_folders import shard
from statistics_factory import make_statistics
from tiny_models import tiny_model

from lightning_moe.evaluation.stages import model_bytes
from lightning_moe.export.huggingface import save_ragged
from lightning_moe.models.discovery import model_shape
from lightning_moe.models.loading import load_model
from lightning_moe.quantization.linears import quantize_model
from lightning_moe.records import CalibrationStatistics, PrunePlan
from lightning_moe.surgery.cut import apply_plan


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A stored model and statistics of it."""
    folder = tmp_path_factory.mktemp("budgets")
    model = tiny_model(dtype=torch.bfloat16)
    model.save_pretrained(folder / "model")
    made = make_statistics(num_layers=2, num_experts=8, width=32, hidden=64)
    fitting = CalibrationStatistics(shape=model_shape(model), corpora=made.corpora, weights=made.weights)
    fitting.save(folder / "statistics.safetensors")
    return folder


def plan(folder, *flags):
    run("plan", "--statistics", folder / "statistics.safetensors", "--out", folder / "plan.json", *flags)
    return PrunePlan.load(folder / "plan.json")


@pytest.mark.parametrize(("bits", "budget"), [(4, "110KB"), (16, 180_000)])
def test_the_folder_that_is_written_is_within_the_budget(bits, budget, folder, tmp_path, caplog):
    made = plan(folder, "--model", folder / "model", "--budget", budget, "--bits", bits, "--method_args", "{align: 4}")
    record = json.loads(made.provenance["budget"])
    allowed = record["asked"]["bytes"]
    assert allowed == (110_000 if bits == 4 else 180_000)
    assert record["binding"] == ["bytes"]
    model = load_model(str(folder / "model"))
    apply_plan(model, plan=made)
    if bits == 4:
        quantize_model(model)
    save_ragged(model, tmp_path / "cut")
    shard(tmp_path / "cut")
    # A block of 4 channels: 3 projections of 64 numbers, 2 bytes each, or 32 bytes of codes, a scale, an absmax.
    block = 4 * 3 * (128 if bits == 16 else 32 + 4 + 1)
    assert allowed - 2 * block - 200 < record["reached"]["bytes"] <= allowed
    assert record["reached"]["bytes"] - 150 < model_bytes(tmp_path / "cut") <= record["reached"]["bytes"]
    (said,) = (record.message for record in caplog.records if "Plan written to" in record.message)
    line = next(line for line in said.splitlines() if line.startswith("bytes "))
    assert line.split()[-1] == "yes"
    assert f"(bytes and parameters as stored in {bits} bit)" in said


def test_two_budgets_and_parameters_in_words(folder):
    made = plan(folder, "--model", folder / "model", "--stored_params", "0.1M", "--active", 0.5)
    record = json.loads(made.provenance["budget"])
    assert record["asked"] == {"stored_params": 100_000, "active": 0.5}
    assert record["reached"]["stored_params"] <= 100_000
    assert record["reached"]["active"] <= 0.5


def test_a_ratio_of_a_model_that_cannot_be_counted_is_planned_all_the_same(tmp_path, caplog, capsys):
    model = tiny_model(hidden_size=32, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    made = make_statistics(num_layers=2, num_experts=8, width=32, hidden=32)
    fitting = CalibrationStatistics(shape=model_shape(model), corpora=made.corpora, weights=made.weights)
    fitting.save(tmp_path / "statistics.safetensors")
    assert plan(tmp_path, "--model", tmp_path / "model", "--prune_ratio", 0.5).num_kept == 256
    assert "Bytes and parameters are not counted: 4-bit storage needs a hidden size" in caplog.text
    with pytest.raises(SystemExit):
        plan(tmp_path, "--model", tmp_path / "model", "--budget", "100KB")
    assert "4-bit storage needs a hidden size" in capsys.readouterr().err


def test_a_budget_without_the_model_is_refused(folder, capsys):
    with pytest.raises(SystemExit):
        plan(folder, "--budget", "1MB")
    assert "`budget` and `stored_params` need `model`" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        plan(folder)
    assert "Say how much to cut: `prune_ratio`, `keep_ratio`" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        plan(folder, "--model", folder / "model", "--budget", "10KB")
    assert "No plan keeps bytes within 10.000 KB" in capsys.readouterr().err
