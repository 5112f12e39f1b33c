"""The command `compare` with a grid, on tiny models: what it writes, short recoveries, and what it refuses."""

import pytest
import yaml
from cli_runs import run, save_job
from tiny_models import tiny_model

from lightning_moe.commands._recovering import ShortRecovery
from lightning_moe.evaluation.compare import Measures, StageSpec, bench
from lightning_moe.export.huggingface import save_ragged
from lightning_moe.files import read_json
from lightning_moe.quantization.linears import quantize_model
from lightning_moe.surgery.cut import convert_experts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_job(tmp_path_factory.mktemp("compare"))


def compare(folder, out, settings, *flags):
    (folder / "job.yaml").write_text(yaml.safe_dump(settings))
    files = ("--config", folder / "data.yaml", "--config", folder / "job.yaml")
    run("compare", *files, "--model", folder / "model", "--out", out, *flags)
    return read_json(out / "compare.json", what="comparison")


GRID = {"methods": [{"method": "exact_global", "method_args": {"align": 8}, "bits": [16, 4]}, "reap"], "ratios": [0.5]}


RECOVERY = {"rows": ["exact_global_50_nf4_s0"], "steps": 1, "adapter": {"expert_rank": 2}}


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_a_grid_with_a_short_recovery(folder, tmp_path, caplog):
    caplog.set_level("INFO")
    name = "exact_global_50_nf4_s0"
    recovery = {"rows": [name], "steps": 2, "expert_learning_rate": 1e-2, "adapter": {"expert_rank": 2}}
    rows = compare(folder, tmp_path, {"grid": GRID, "recovery": recovery})
    by_name = {row["name"]: row for row in rows}
    cut = [name, "exact_global_50_s0", "reap_50_s0"]
    assert set(by_name) == {"dense", "dense_nf4", *cut, "dense_nf4_recovered", f"{name}_recovered"}
    recovered, control = by_name[f"{name}_recovered"], by_name["dense_nf4_recovered"]
    assert (recovered["method"], recovered["ratio"], recovered["bits"]) == ("exact_global", 0.5, 4)
    assert recovered["recovered"]
    assert control["method"] == "dense"
    assert recovered["steps"] == control["steps"] == 2
    assert recovered["bytes"] > by_name[name]["bytes"]  # with its adapter
    assert recovered["nll"] != by_name[name]["nll"]
    assert control["nll"] != by_name["dense_nf4"]["nll"]
    assert (tmp_path / "compare.csv").is_file()
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
    caplog.clear()
    assert compare(folder, tmp_path, {"grid": GRID, "recovery": recovery}) == rows
    assert "5 of 5 rows are reused" in caplog.text
    assert "recovered: " not in caplog.text


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_stages_with_a_recovery_get_its_control(folder, tmp_path):
    stage = {"name": "a", "prune_ratio": 0.5, "method_args": {"align": 8}, "bits": 4, "repair": False}
    rows = compare(folder, tmp_path, {"stages": [stage], "recovery": RECOVERY | {"rows": ["a"]}})
    assert [row["name"] for row in rows] == ["dense", "dense_nf4", "a", "dense_nf4_recovered", "a_recovered"]


def test_what_was_made_before_a_row_failed_is_written(folder, tmp_path, monkeypatch):
    original = Measures.of_folder

    def failing(own, name, **settings):
        if name == "reap_50_s0":
            raise ValueError("no memory is left")
        return original(own, name, **settings)

    monkeypatch.setattr(Measures, "of_folder", failing)
    with pytest.raises(SystemExit):
        compare(folder, tmp_path, {"grid": {"methods": ["frequency", "reap", "aimer"], "ratios": [0.5]}})
    rows = read_json(tmp_path / "compare.json", what="comparison")
    assert [row["name"] for row in rows] == ["dense", "frequency_50_s0"]
    assert "frequency" in (tmp_path / "compare.txt").read_text()


def test_a_folder_that_cannot_be_written_to(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "evaluate_stage", lambda *_, **__: pytest.fail("a row was measured"))
    (tmp_path / "file").write_text("no folder")
    settings = {"grid": {"methods": ["reap"], "ratios": [0.5]}}
    with pytest.raises(SystemExit):
        compare(folder, tmp_path / "file" / "out", settings)
    assert "`out` must be a folder that can be written to, got '" in capsys.readouterr().err


def test_a_full_disk_is_one_line(folder, tmp_path, capsys, monkeypatch):
    def full(*_args, **_settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bench, "evaluate_stage", full)
    with pytest.raises(SystemExit):
        compare(folder, tmp_path, {"grid": {"methods": ["reap"], "ratios": [0.5]}})
    assert capsys.readouterr().err == "python -m lightning_moe: compare: [Errno 28] No space left on device\n"


def test_a_packed_model_is_no_dense_one(folder, tmp_path, capsys):
    model = tiny_model(vocab_size=4096)
    convert_experts(model)
    quantize_model(model)
    save_ragged(model, tmp_path / "packed")
    with pytest.raises(SystemExit):
        compare(folder, tmp_path / "out", {"grid": GRID}, "--model", tmp_path / "packed")
    assert "packed' is packed in NF4, and the rows are compared with a dense model in 16" in capsys.readouterr().err


def test_samples_read_other_text(folder, tmp_path):
    rows = compare(folder, tmp_path, {"grid": {"methods": ["reap"], "ratios": [0.5], "samples": 2}})
    notes = [read_json(tmp_path / f"statistics_{sample}.json", what="note") for sample in (0, 1)]
    assert notes[0]["text"] != notes[1]["text"]
    assert [row["sample"] for row in rows] == [0, 0, 1]
    assert not list(tmp_path.glob("models/*"))


def test_gradients_are_missed_before_anything_runs(folder, tmp_path, capsys):
    run("calibrate", "--config", folder / "data.yaml", "--model", folder / "model", "--out", tmp_path / "s.safetensors")
    settings = {"grid": {"methods": ["snip"], "ratios": [0.5]}, "statistics": str(tmp_path / "s.safetensors")}
    with pytest.raises(SystemExit):
        compare(folder, tmp_path / "out", settings)
    assert "A method asks for gradients of the loss, and " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_models_stay_where_asked(folder, tmp_path):
    compare(folder, tmp_path, {"grid": {"methods": ["reap"], "ratios": [0.5]}}, "--keep_models", "true")
    assert (tmp_path / "models" / "reap_50_s0" / "config.json").is_file()


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({}, "needs a `grid`, `stages` or a `matrix`, got none"),
        ({"grid": {"methods": ["magic"], "ratios": [0.5]}}, "got 'magic'"),
        ({"grid": {"methods": [], "ratios": [0.5]}}, "`methods` of the grid is an empty list"),
        ({"grid": {"methods": ["reap"], "ratios": [1.5]}}, r"must be in \[0, 1\), got 1.5"),
        ({"grid": {"methods": ["reap"], "ratios": [0.5], "samples": 2}, "statistics": "x"}, "ask for 2 samples"),
        ({"grid": GRID, "recovery": {"rows": ["dense"], "steps": 1}}, r"must name rows in 4 bit, got \['dense'\]"),
        ({"grid": GRID, "baseline": "paper_a"}, "`baseline` must be a method of the grid, got 'paper_a'"),
        ({"grid": GRID, "baseline": "paper_a", "matrix": True}, "`baseline` must be a method of the grid"),
        ({"grid": GRID, "tasks": ["no_such_task"]}, r"Unknown tasks \['no_such_task'\]"),
        ({"grid": GRID, "tasks": "piqa,no_such_task"}, r"Unknown tasks \['no_such_task'\]"),
        ({"grid": GRID, "tasks": ["piqa"], "limit": 0}, "`limit` must be at least 1 or null for all items, got 0"),
        ({"grid": GRID, "tasks": ["code"]}, "Give `allow_code_execution`"),
        ({"grid": GRID, "recovery": RECOVERY, "data": {"train": None}}, "`data.train` names no corpora"),
    ],
)
def test_a_wrong_job_is_refused_before_anything_runs(folder, tmp_path, capsys, settings, match):
    with pytest.raises(SystemExit):
        compare(folder, tmp_path, settings)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    with pytest.raises(ValueError, match=match):
        raise ValueError(error)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"rows": []}, r"needs names in `rows` and `steps` >= 1, got \[\] and 1"),
        ({"steps": 0}, r"got \['a'\] and 0"),
        ({"distillation": 2.0}, r"`recovery.distillation` must be in \[0, 1\], got 2.0"),
        ({"rows": ["b"]}, r"must name rows in 4 bit, got \['b'\]; there are \['a'\]"),
        ({}, "needs the unpruned model in 4 bit as its control, under the name 'dense_nf4'"),
    ],
)
def test_a_wrong_recovery_is_refused(settings, match):
    rows = [StageSpec(name="a", prune_ratio=0.5, bits=4), StageSpec(name="b", prune_ratio=0.5)]
    with pytest.raises(ValueError, match=match):
        ShortRecovery(**({"rows": ["a"], "steps": 1} | settings)).check(rows)
