"""Names that files and users give never lead out of the folder that they are names in."""

from pathlib import Path

import pytest
from comparison_rows import dense_row, make_row
from statistics_factory import make_statistics

from callbacks import CompressionReport
from lightning_moe.allocation import build_method
from lightning_moe.assets import asset_path, resolve_asset
from lightning_moe.cli import main
from lightning_moe.evaluation.compare.rows import StageSpec
from lightning_moe.evaluation.stages import check_stage_name
from lightning_moe.evaluation.tasks import plan_tasks
from lightning_moe.reporting.report import write_report

LEADING_OUT = ("../outside", "/etc/passwd", "a/../../b", "..", "a\\b", "a\nb", "a\0b", "")


@pytest.mark.parametrize("name", ["../files.py", "/etc/passwd", "text/../../files.py", "small_moe\\config.json", "a\0"])
def test_assets_are_those_of_the_package(name):
    with pytest.raises(ValueError, match="leads out of the package: an asset is a shipped file"):
        asset_path(name)
    with pytest.raises(ValueError, match="leads out of the package"):
        resolve_asset(f"asset:{name}")
    assert asset_path("small_moe/config.json").is_file()


@pytest.mark.parametrize("name", LEADING_OUT)
def test_rows_have_plain_names(name):
    with pytest.raises(ValueError, match="`name` of a stage must be a plain file name"):
        check_stage_name(name)
    with pytest.raises(ValueError, match="`name` of a stage must be a plain file name"):
        StageSpec(name=name, prune_ratio=0.5)
    with pytest.raises(ValueError, match="`name` of a stage must be a plain file name"):
        CompressionReport(folder="results", name=name)


def test_names_leave_room_for_what_is_added_to_them(tmp_path):
    assert check_stage_name("x" * 200) == "x" * 200
    (tmp_path / f".{'x' * 200}_merged_16bit.json.12345678.tmp").touch()  # as long as it gets
    with pytest.raises(ValueError, match="`name` of a stage must have at most 200 bytes, got 202"):
        check_stage_name("é" * 101)
    with pytest.raises(ValueError, match=r"cannot end in '\.exports', got 'cut\.exports'"):
        check_stage_name("cut.exports")


def test_a_row_called_dot_dot_does_not_empty_the_folder_of_results(tmp_path, capsys):
    """Models of rows lie in `models/NAME` and are removed after they were measured."""
    (tmp_path / "kept.txt").write_text("kept")
    flags = ["--data.tokenizer", "asset:small_moe", "--model", "asset:small_moe", "--out", str(tmp_path)]
    with pytest.raises(SystemExit):
        main(["compare", *flags, "--stages", "[{name: '..', prune_ratio: 0.5}]"])
    assert "must be a plain file name, got '..'" in capsys.readouterr().err
    assert (tmp_path / "kept.txt").read_text() == "kept"


def test_tasks_are_names_and_not_files(tmp_path):
    (tmp_path / "own.yaml").write_text("task: own\n")
    for name in ("../own", str(tmp_path / "own.yaml"), str(tmp_path)):
        with pytest.raises(ValueError, match="Unknown tasks"):
            plan_tasks([name])


def test_a_report_names_its_files_itself(tmp_path):
    statistics = make_statistics()
    plans = {name: build_method("reap").plan(statistics, prune_ratio=0.5) for name in ("../../out", "/etc/out", "a\0b")}
    rows = [dense_row(), make_row("../../method", 0.1, name="../../row"), make_row("/etc/x", 0.2, name="/etc/row")]
    folder = tmp_path / "a" / "b"
    write_report(folder, title="../../title", rows=rows, plans=plans)
    written = {file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*") if file.is_file()}
    assert all(Path(file).is_relative_to("a/b") for file in written)
    pictures = {Path(file).stem for file in written if file.endswith(".png")}
    assert pictures == {"pareto", "retention", "plan_0_widths", "plan_0_kept"}
    assert len(written) == len(pictures) + 1
