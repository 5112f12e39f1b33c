"""No command writes over what it reads, and none works for hours for a file that it cannot write."""

import pytest
from cli_runs import run, save_job
from safetensors.torch import load_file

from lightning_moe.assets import resolve_asset
from lightning_moe.commands import _budgeting, _sizing, calibration, exporting, pruning
from lightning_moe.commands._shared import check_writable
from lightning_moe.export.apart import check_apart


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Nothing may come as far as the work."""
    for module, name in (
        (calibration, "open_folder"),
        (pruning, "open_folder"),
        (exporting, "load_model"),
        (exporting, "export_streamed"),
        (_budgeting, "build_method"),
        (_sizing, "UniformSizes"),
    ):
        monkeypatch.setattr(module, name, None)
    (tmp_path / "job").mkdir()
    monkeypatch.chdir(save_job(tmp_path / "job"))
    return tmp_path / "job"


@pytest.fixture
def plan(monkeypatch):
    monkeypatch.setattr(pruning.PrunePlan, "load", lambda file: None)


def refused(capsys, *arguments, match):
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert match in error
    assert "Traceback" not in error


def spellings(job):
    (job / "link").symlink_to(job / "model")
    (job / "parent").symlink_to(job)
    inside = {"model/pruned": "is inside 'model'", "link/pruned": "is inside 'model'"}
    around = {".": "contains 'model'", "parent": "contains 'model'", "..": "contains 'model'"}
    same = ("model", "model/", "./model", "other/../model", str(job / "model"), "link", "link/", "parent/model")
    return dict.fromkeys(same, "is 'model'") | inside | around


def test_prune_never_replaces_its_source(job, plan, capsys):
    before = {file.name: file.read_bytes() for file in (job / "model").iterdir()}
    for out, match in spellings(job).items():
        arguments = ("--config", "data.yaml", "--model", "model", "--plan", "plan.json", "--out", out)
        refused(capsys, "prune", *arguments, match=f"`out` '{out}' {match}, which is read and would be overwritten")
    assert {file.name: file.read_bytes() for file in (job / "model").iterdir()} == before


@pytest.mark.parametrize("read", ["plan", "novices"])
def test_prune_never_replaces_a_folder_with_its_plan(read, job, plan, capsys):
    (job / "old").mkdir()
    (job / "old" / "mine").write_text("{}")
    files = {"plan": "plan.json", "novices": "s"} | {read: "old/mine"}
    arguments = ("--config", "data.yaml", "--model", "model", "--plan", files["plan"], "--novices", files["novices"])
    refused(capsys, "prune", *arguments, "--out", "old", match="`out` 'old' contains 'old/mine'")


@pytest.mark.parametrize("role", ["model", "adapter"])
def test_export_never_replaces_its_source(role, job, capsys):
    (job / "out").mkdir()
    (job / "model").rename(job / "out" / "nf4")
    other = job / "other"
    sources = {"model": other, "adapter": other} | {role: job / "out" / "nf4"}
    flags = ("--model", sources["model"], "--adapter", sources["adapter"], "--formats", "[ragged,nf4]")
    refused(capsys, "export", *flags, "--out", "out", match=f"`out` 'out/nf4' is '{job}/out/nf4', which is read")
    (job / "out" / "nf4").rename(job / "base")
    (job / "out" / "nf4").mkdir()
    (job / "base").rename(job / "out" / "nf4" / "base")
    sources[role] = job / "out" / "nf4" / "base"
    flags = ("--model", sources["model"], "--adapter", sources["adapter"], "--formats", "[nf4]")
    refused(capsys, "export", *flags, "--out", "out/", match=f"`out` 'out/nf4' contains '{job}/out/nf4/base'")
    assert load_file(job / "out" / "nf4" / "base" / "model.safetensors")


@pytest.mark.parametrize("out", ["model/model.safetensors", "model/config.json", "other/../model/config.json"])
def test_files_of_the_model_are_not_overwritten(out, job, capsys):
    flags = ("--config", "data.yaml", "--model", "model", "--out", out)
    refused(capsys, "calibrate", *flags, match=f"`out` '{out}' is 'model/")
    flags = ("--statistics", "s", "--prune_ratio", 0.5, "--model", "model", "--out", out)
    refused(capsys, "plan", *flags, match=f"`out` '{out}' is 'model/")
    flags = ("--config_json", "model", "--ratio", 0.5, "--json", out)
    refused(capsys, "plan", *flags, match=f"`json` '{out}' is 'model/")


def test_a_plan_is_not_written_over_its_statistics(job, capsys):
    (job / "s.safetensors").write_text("sums")
    flags = ("--statistics", "s.safetensors", "--prune_ratio", 0.5, "--out", "./s.safetensors")
    refused(capsys, "plan", *flags, match="`out` './s.safetensors' is 's.safetensors'")
    assert (job / "s.safetensors").read_text() == "sums"


def test_a_place_beside_the_source_is_free(job):
    check_apart("model2", inputs=["model", "asset:small_moe", "owner/name", None])
    check_apart("model/statistics.safetensors", inputs=["model"], within=False)
    with pytest.raises(ValueError, match="is inside 'asset:small_moe'"):
        check_apart(resolve_asset("asset:small_moe") + "/new", inputs=["asset:small_moe"])


def test_a_file_that_cannot_be_written_is_refused_before_the_work(job, capsys):
    (job / "folder").mkdir()
    (job / "file").write_text("")
    flags = {
        "calibrate": ("--config", "data.yaml", "--model", "model", "--workspace", "work", "--out"),
        "plan": ("--statistics", "s", "--prune_ratio", 0.5, "--out"),
    }
    for command, own in flags.items():
        refused(capsys, command, *own, "folder", match="`out` must be a file, 'folder' is a folder")
        refused(capsys, command, *own, "file/x", match="`out` must be a file that can be written, got 'file/x'")
        refused(capsys, command, *own, "/proc/x/y", match="`out` must be a file that can be written, got '/proc/x/y'")
    flags = ("--config_json", "model", "--ratio", 0.5, "--json", "folder")
    refused(capsys, "plan", *flags, match="`json` must be a file, 'folder' is a folder")
    check_writable("new/folders/file")
    assert not (job / "new").exists()
