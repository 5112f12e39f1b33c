"""The commands on a folder that they wrote: calibrate, plan and prune a pruned model again."""

import pytest
from cli_runs import run, save_job
from pruned_models import loaded, logits
from tiny_models import random_tokens

from lightning_moe.export.manifest import read_manifest
from lightning_moe.models.discovery import model_shape
from lightning_moe.records import PrunePlan

IDS = random_tokens()


def round_of(folder, source, name, *, quantize, ratio=0.25):
    """Calibrate, plan and prune `source` into `name`."""
    data = ("--config", folder / "data.yaml")
    run("calibrate", *data, "--model", source, "--out", folder / f"{name}.safetensors")
    method = ("--method_args", '{"align": 4}')
    plan = folder / f"{name}.json"
    statistics = folder / f"{name}.safetensors"
    run("plan", "--statistics", statistics, "--prune_ratio", ratio, "--out", plan, *method)
    arguments = ("--plan", plan, "--out", folder / name, "--quantize", quantize, "--repair", "false")
    run("prune", *data, "--model", source, *arguments)
    return PrunePlan.load(plan)


@pytest.fixture(scope="module", params=["none", "nf4"])
def rounds(request, tmp_path_factory):
    folder = save_job(tmp_path_factory.mktemp(request.param))
    first = round_of(folder, folder / "model", "once", quantize=request.param)
    second = round_of(folder, folder / "once", "twice", quantize=request.param)
    return folder, first, second


def test_the_second_round_counts_from_what_the_first_left(rounds):
    folder, first, second = rounds
    assert second.shape == model_shape(loaded(str(folder / "once")))
    assert second.shape.num_channels == first.num_kept == 384
    assert second.num_kept == pytest.approx(288, abs=4)
    twice = loaded(str(folder / "twice"))
    assert model_shape(twice).num_channels == second.num_kept
    assert logits(twice, IDS).isfinite().all()


def test_the_folder_remembers_both_plans(rounds):
    folder, first, second = rounds
    manifest = read_manifest(folder / "twice")
    assert [plan.digest for plan in manifest.plans] == [first.digest, second.digest]
    assert manifest.base_model == str(folder / "model")


def test_the_first_plan_is_refused_by_its_own_result(rounds, capsys):
    folder, *_ = rounds
    arguments = ("--plan", folder / "once.json", "--out", folder / "again", "--repair", "false")
    with pytest.raises(SystemExit):
        run("prune", "--config", folder / "data.yaml", "--model", folder / "once", *arguments)
    said = capsys.readouterr().err
    assert "This model seems to be cut already: it has 384 channels and the plan is for 512." in said
    assert not (folder / "again").exists()
