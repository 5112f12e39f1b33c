"""Files of results that somebody else wrote: refused by the name of the file and the field, or read as they are."""

import gzip
import json
from dataclasses import replace

import pytest
from comparison_rows import dense_row, make_row
from statistics_factory import make_statistics

from lightning_moe.allocation import build_method
from lightning_moe.cli import main
from lightning_moe.commands._budgeting import noted_budget
from lightning_moe.evaluation.compare.calibrations import SampleCalibration
from lightning_moe.evaluation.matrix.run import _losses
from lightning_moe.evaluation.routing import LayerRouting, RoutingTable
from lightning_moe.evaluation.stages import load_row, load_stages, save_stage
from lightning_moe.evaluation.summary import summarise
from lightning_moe.evaluation.task_sets import LocalSet, read_splits
from lightning_moe.export.manifest import MANIFEST_NAME, read_manifest
from lightning_moe.reporting.checks import check_known, check_number
from lightning_moe.reporting.sections.matrix import matrix_block

ROW = {"name": "cut", "nll": 2.0, "prune_ratio": 0.5}


def write(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
    return file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 5}, "row.json' needs 'name', a text, got int"),
        ({"name": ["a"]}, "row.json' needs 'name', a text, got list"),
        ({"name": "../x"}, "`name` of a stage must be a plain file name, got '../x'"),
        ({"nll": "low"}, "'nll' of '.*row.json' must be a number, got 'low'"),
        ({"nll": None}, "'nll' of '.*row.json' must be a number, got None"),
        ({"prune_ratio": 1.5}, r"'prune_ratio' of '.*row.json' must be in \[0, 1\), got 1.5"),
        ({"prune_ratio": float("nan")}, "'prune_ratio' of '.*row.json' must be finite and >= 0, got nan"),
        ({"prune_ratio": None}, "'prune_ratio' of '.*row.json' must be a number, got None"),
        ({"bytes": -1}, "'bytes' of '.*row.json' must be finite and >= 0, got -1"),
        ({"seconds": 10**400}, r"'seconds' of '.*row.json' must be a number below 2\*\*63, got one of 1329 bits"),
        ({"digest": ["a"]}, "row.json' needs 'digest', a text, got list"),
        ({"nll_per_corpus": [1]}, "'nll_per_corpus' of '.*row.json' must be a mapping, got list"),
        ({"nll_per_corpus": {"a": "b"}}, "'a' of 'nll_per_corpus' of '.*row.json' must be a number, got 'b'"),
        ({"tasks": {"piqa": 5}}, "'piqa' of '.*row.json' must be a mapping, got int"),
        ({"tasks": {"piqa": {}}}, "'acc' of 'piqa' of '.*row.json' must be a number, got None"),
    ],
)
def test_a_row_is_checked_field_by_field(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load_row(write(tmp_path / "row.json", ROW | change))


def test_a_model_that_broke_is_still_a_row(tmp_path):
    save_stage(tmp_path, stage=ROW | {"nll": float("inf"), "bytes": None, "tasks": {}})
    assert load_stages(tmp_path)["cut"]["nll"] == float("inf")


def test_two_files_with_one_name_are_refused(tmp_path):
    for file in ("a", "b"):
        write(tmp_path / "stages" / f"{file}.json", ROW)
    with pytest.raises(ValueError, match=r"b.json' and another file are both row 'cut'. Delete one of them"):
        load_stages(tmp_path)


@pytest.mark.parametrize("content", [{"path": "x"}, 5, ["x"], [[1]]])
def test_a_list_of_exports_is_one(tmp_path, content):
    save_stage(tmp_path, stage=ROW)
    write(tmp_path / "stages" / "cut.exports.json", content)
    with pytest.raises(ValueError, match=r"cut.exports.json' must be a list of exports, got"):
        summarise(tmp_path)


def report_says(folder, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["report", "--folder", str(folder)])
    said = capsys.readouterr().err.strip()
    assert stopped.value.code == 1
    assert len(said.splitlines()) == 1
    return said


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("compare.json", {"a": 1}, "compare.json' must be a list of rows, got dict"),
        ("compare.json", [], "compare.json' must have 1 to 100000 rows, got 0"),
        ("compare.json", [None], "compare.json' must be a mapping, got NoneType"),
        ("compare.json", [{"method": "reap"}], "compare.json' needs 'name', a text, got None"),
        ("matrix.json", 7, "matrix.json' must be a list of rows, got int"),
        ("matrix.json", [{"method": 1}], "matrix.json' needs 'method', a text, got int"),
        ("router.json", [], "router.json' must be a mapping, got list"),
        ("router.json", {}, "'before' of '.*router.json' must be a mapping, got NoneType"),
        ("router.json", {"before": {"corpora": []}}, "'corpora' of 'before' of '.*' must be a mapping, got list"),
    ],
)
def test_report_names_the_file_that_is_wrong(tmp_path, capsys, file, content, message):
    write(tmp_path / "compare.json", [dense_row(), make_row("reap", 0.1, name="a")])
    write(tmp_path / file, content)
    with pytest.raises(ValueError, match=message):
        raise ValueError(report_says(tmp_path, capsys))


def layer(**fields):
    return {"entropy": 0.5, "load": [0.5, 0.5, 0.0], "evicted": [2], "num_tokens": 4} | fields


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"entropy": "x"}, "'entropy' of 'code' must be a number, got 'x'"),
        ({"entropy": None}, "'entropy' of 'code' must be a number, got null"),
        ({"entropy": float("inf")}, "'entropy' of 'code' must be finite"),
        ({"load": 5}, "'load' of 'code' must be a list, got int"),
        ({"load": []}, "must name different experts of its 'load', got 0 loads"),
        ({"load": ["a"], "evicted": []}, "'0' of 'load' of 'code' must be a number, got 'a'"),
        ({"evicted": [3]}, "'evicted' of 'code' must name different experts of its 'load', got 3 loads"),
        ({"evicted": [-1]}, "must name different experts"),
        ({"evicted": [2, 2]}, "must name different experts"),
        ({"evicted": [[1]]}, "must name different experts"),
        ({"num_tokens": 10**400}, r"'num_tokens' of 'code' must be a number below 2\*\*63"),
    ],
)
def test_a_record_of_routers_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        LayerRouting.from_dict(layer(**change), where="'code'")


def test_a_table_of_routers_is_checked():
    table = {"step": 3, "corpora": {"code": [layer()]}}
    assert RoutingTable.from_dict(table).to_dict()["corpora"]["code"][0]["evicted"] == [2]
    with pytest.raises(ValueError, match="Every corpus in 'corpora' of the record of the routers needs layers"):
        RoutingTable.from_dict(table | {"corpora": {"code": []}})
    with pytest.raises(ValueError, match="'step' of the record of the routers must be a number, got null"):
        RoutingTable.from_dict(table | {"step": None})


def cells(**fields):
    row = {"method": "reap", "size": 1, "loss_above_dense": 0.1, "variant": False}
    return [row | {"calibration": one, "evaluation": other} | fields for one in "ab" for other in "ab"]


def test_a_matrix_with_holes_is_refused():
    with pytest.raises(ValueError, match="lacks the row of `reap` calibrated on 1 tokens of 'b' and evaluated on 'b'"):
        matrix_block(cells()[:-1])
    with pytest.raises(ValueError, match="Row 0 of the matrix needs 'calibration', a text, got int"):
        matrix_block(cells(calibration=5))


def test_a_matrix_too_large_for_a_page_is_refused_before_it_is_filled():
    row = cells()[0]
    long = [row | {"calibration": f"c{index}", "evaluation": f"e{index}"} for index in range(200)]
    with pytest.raises(ValueError, match="The matrix has more than 10000 cells of `reap`: too many for a page"):
        matrix_block(long)


def test_a_kept_cell_of_a_matrix_must_be_of_these_corpora(tmp_path):
    file = tmp_path / "cell.json"
    assert _losses({"nll_per_corpus": {"a": 1.0}}, file=file, corpora=["a"]) == {"a": 1.0}
    with pytest.raises(ValueError, match=r"cell.json' must be a mapping, got list"):
        _losses([], file=file, corpora=["a"])
    with pytest.raises(ValueError, match=r"'nll_per_corpus' of '.*' must name the corpora \['a'\], got \['b'\]"):
        _losses({"nll_per_corpus": {"b": 1.0}}, file=file, corpora=["a"])
    with pytest.raises(ValueError, match=r"'a' of 'nll_per_corpus' of '.*cell.json' must be a number, got 'x'"):
        _losses({"nll_per_corpus": {"a": "x"}}, file=file, corpora=["a"])


def test_a_note_on_statistics_that_is_none_is_refused(tmp_path):
    (tmp_path / "s.safetensors").touch()
    write(tmp_path / "s.json", ["not", "a", "note"])
    kept = SampleCalibration(model=None, loaders={}, file=tmp_path / "s.safetensors", origin={})
    with pytest.raises(ValueError, match=r"s.json' must be a mapping, got list. Delete it"):
        kept.statistics  # noqa: B018


MANIFEST = {
    "kind": "export manifest",
    "version": 1,
    "format": "ragged",
    "source": "a",
    "base_model": "a",
    "plans": [],
    "versions": {},
    "stored_params": 1,
    "active_params": 1.0,
    "bits": {"experts": 16, "linears": 16, "embeddings": 16},
    "files": {},
    "bytes": 0,
    "dropped": [],
    "max_logit_diff": None,
}
PLAN = {"digest": "0", "method": "reap", "corpora": "", "statistics": "", "prune_ratio": 0.5}
ERROR = {"weights": {"a": 0.1}, "kl": 0.1, "max_logit_diff": 0.1, "num_tokens": 2, "random_text": False}


@pytest.mark.parametrize(
    "change",
    [
        {"bits": {"experts": 16}},
        {"bits": {"experts": 16, "linears": 16, "embeddings": 16, "other": 16}},
        {"stored_params": 10**400},
        {"max_logit_diff": float("inf")},
        {"plans": [PLAN | {"prune_ratio": float("nan")}]},
        {"plans": [PLAN | {"prune_ratio": True}]},
        {"plans": [PLAN | {"prune_ratio": 1.5}]},
        {"added_error": ERROR | {"weights": {"a": "b"}}},
        {"added_error": ERROR | {"kl": None}},
        {"added_error": ERROR | {"num_tokens": 0.5}},
        {"added_error": ERROR | {"random_text": 1}},
    ],
)
def test_a_manifest_is_checked_where_something_reads_it_later(tmp_path, change):
    write(tmp_path / MANIFEST_NAME, MANIFEST | {"plans": [PLAN], "added_error": ERROR})
    assert read_manifest(tmp_path) is not None
    write(tmp_path / MANIFEST_NAME, MANIFEST | change)
    with pytest.raises(ValueError, match=f"manifest.json': `{next(iter(change))}` cannot be"):
        read_manifest(tmp_path)


def test_numbers_without_a_float_are_no_measurements():
    assert check_number({"a": float("nan")}, key="a", where="it") != 0
    with pytest.raises(ValueError, match=r"'a' of it must be a number below 2\*\*63, got one of 1329 bits"):
        check_known({"a": 10**400}, key="a", where="it")


def test_evaluate_states_no_ratio_that_report_refuses(tmp_path, capsys):
    flags = ["--data.tokenizer", "asset:small_moe", "--model", "asset:small_moe", "--out", str(tmp_path / "out")]
    for ratio in ("nan", "-0.5", "1.5", "inf"):
        with pytest.raises(SystemExit):
            main(["evaluate", *flags, "--prune_ratio", ratio])
        said = capsys.readouterr().err
        assert "`prune_ratio` must be in [0, 1), got" in said or "`prune_ratio`: Expected a number" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["no json", "[]", "5", "[" * 100_000, '{"asked": 5}', "9" * 5000])
def test_a_budget_in_a_plan_is_checked_before_it_is_used(text):
    plan = build_method("reap").plan(make_statistics(), prune_ratio=0.5)
    assert noted_budget(replace(plan, provenance={"budget": '{"asked": {"bytes": 5}}'})) == {"asked": {"bytes": 5}}
    with pytest.raises(ValueError, match="`budget` in the plan's provenance must be a mapping as JSON, got"):
        noted_budget(replace(plan, provenance={"budget": text}))


REQUESTS = gzip.compress(b'{"doc_id": 0, "doc": {"question": "why"}}\n' * 40, mtime=0)


@pytest.mark.parametrize(
    "content",
    [
        REQUESTS[:20] + b"\xff\xff\xff" + REQUESTS[23:],
        REQUESTS[:-9],
        b"no gzip",
        gzip.compress(b"[1, 2]\n", mtime=0),
        gzip.compress(b'{"doc_id": "a", "doc": {}}\n', mtime=0),
        gzip.compress(b'{"doc_id": 0}\n', mtime=0),
        gzip.compress(b'{"doc_id": 0, "doc": 5}\n', mtime=0),
        gzip.compress(b"[" * 100_000, mtime=0),
        gzip.compress(b"\xff\n", mtime=0),
    ],
)
def test_damaged_items_of_tasks_are_named(tmp_path, content):
    (tmp_path / "requests.jsonl.gz").write_bytes(REQUESTS)
    read = {"splits": ("test",), "local": LocalSet(folder="x")}
    assert list(read_splits(tmp_path, **read)["test"]["question"]) == ["why"]
    (tmp_path / "requests.jsonl.gz").write_bytes(content)
    with pytest.raises(ValueError, match=f"The items in '{tmp_path}' cannot be read") as error:
        read_splits(tmp_path, **read)
    assert "\n" not in str(error.value)
