"""Matrices of calibrations: each cell is what the pieces give, text runs once, cells are made once."""

import csv
import json

import pytest
import torch
import yaml
from cli_runs import run, save_job
from compare_runs import BLOCKS, LISTS, save_tiny
from tiny_models import random_tokens

from lightning_moe.allocation import build_method
from lightning_moe.calibration.collector import collect_statistics
from lightning_moe.evaluation import matrix as package
from lightning_moe.evaluation.matrix import Matrix, MatrixMethod, MatrixRun, matrix_tables, prefixes, write_matrix
from lightning_moe.evaluation.matrix.tables import mean_losses
from lightning_moe.evaluation.perplexity import evaluate_model
from lightning_moe.models.loading import load_model
from lightning_moe.reporting.figures.matrix import loss_matrix
from lightning_moe.surgery.cut import apply_plan

LENGTH = 16
OURS = MatrixMethod(method="exact_global", method_args=BLOCKS)
SMALL = {"methods": [OURS], "tokens": [2 * LENGTH, 4 * LENGTH], "smoothings": [], "min_widths": []}


def corpus(seed, *, num_rows=4):
    ids_NS = random_tokens(batch=num_rows, length=LENGTH, seed=seed)
    return [{"input_ids": ids_S, "attention_mask": torch.ones_like(ids_S), "labels": ids_S} for ids_S in ids_NS]


ROWS = {"held": corpus(1), "b": corpus(2)}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("matrix") / "model")


@pytest.fixture(scope="module")
def made(model, tmp_path_factory):
    """Rows of a small matrix with one legal and one illegal variant."""
    wide = MatrixMethod(method="paper_a", method_args={"align": 8, "min_width": 64}, name="too_wide")
    legal = MatrixMethod(method="paper_a", method_args={"align": 8, "min_width": 8}, name="legal")
    return matrix_run(model, tmp_path_factory.mktemp("made"), variants=[wide, legal]).run()


def matrix_run(model, out, *, rows=ROWS, **settings):
    return MatrixRun(
        source=model, matrix=Matrix(**(SMALL | settings)), rows=rows, held_out=LISTS, out=out, batch_size=3
    )


def batch(rows):
    return [{name: torch.stack([row[name] for row in rows]) for name in rows[0]}]


def test_a_cell_is_the_model_cut_by_that_text_and_evaluated(model, made):
    """Against one calibration of exactly the rows that a cell reads, in one batch."""
    texts = {
        ("held", 32): {"held": ROWS["held"][:2]},
        ("b", 64): {"b": ROWS["b"]},
        ("all", 64): {"held": ROWS["held"][:2], "b": ROWS["b"][:2]},
        ("all_each", 64): ROWS,
    }
    for (calibration, size), text in texts.items():
        dense = load_model(model, dtype="float32")
        statistics = collect_statistics(dense, loaders={name: batch(rows) for name, rows in text.items()})
        apply_plan(dense, plan=build_method("exact_global", **BLOCKS).plan(statistics, prune_ratio=0.5))
        expected = evaluate_model(dense, loaders=LISTS).nll_per_corpus
        cell = [
            row
            for row in made
            if (row["method"], row["calibration"], row["size"]) == ("exact_global", calibration, size)
        ]
        assert {row["evaluation"]: row["nll"] for row in cell} == pytest.approx(expected, abs=1e-6)
        assert {row["tokens"] for row in cell} == {LENGTH * sum(map(len, text.values()))}


def test_losses_are_above_the_dense_model(model, made):
    dense = evaluate_model(load_model(model, dtype="float32"), loaders=LISTS).nll_per_corpus
    assert [row["method"] for row in made[:2]] == ["dense", "dense"]
    for row in made:
        assert row["loss_above_dense"] == pytest.approx(row["nll"] - dense[row["evaluation"]], abs=1e-6)


def test_every_calibration_size_and_legal_variant_has_a_row(made):
    cuts = {(row["method"], row["calibration"], row["size"]) for row in made[2:]}
    calibrations = ("held", "b", "all", "all_each")
    expected = {("exact_global", name, size) for name in calibrations for size in (32, 64)}
    assert cuts == expected | {("legal", "all_each", 32), ("legal", "all_each", 64)}
    assert len(made) == 2 * (1 + len(cuts))


def test_each_row_of_text_runs_once(model, tmp_path, monkeypatch):
    seen = []

    def counted(dense, *, loaders):
        seen.extend(row for batches in loaders.values() for one in batches for row in one["input_ids"].tolist())
        return collect_statistics(dense, loaders=loaders, progress=False)

    monkeypatch.setattr(prefixes, "collect_statistics", counted)
    matrix_run(model, tmp_path).run()
    assert sorted(seen) == sorted(row["input_ids"].tolist() for rows in ROWS.values() for row in rows)


def test_cells_are_reused_until_what_decides_them_changes(model, tmp_path, monkeypatch):
    measured = []
    original = package.run.evaluate_model

    def counted(*arguments, **settings):
        measured.append(1)
        return original(*arguments, **settings)

    monkeypatch.setattr(package.run, "evaluate_model", counted)
    rows = matrix_run(model, tmp_path).run()
    # The dense model and four calibrations at two sizes, of which `all` at 64 reads what `all_each` at 32 does.
    assert len(measured) == 8
    assert matrix_run(model, tmp_path).run() == rows
    assert len(measured) == 8
    # `b` is another text: its two cells and those of all corpora are made anew.
    matrix_run(model, tmp_path, rows=ROWS | {"b": corpus(3)}).run()
    assert len(measured) == 13
    matrix_run(model, tmp_path, prune_ratio=0.25).run()
    assert len(measured) == 20


def test_settings_that_mean_the_same_are_made_once(model, tmp_path, monkeypatch):
    measured = []
    original = MatrixRun._measure
    monkeypatch.setattr(MatrixRun, "_measure", lambda own, *a, **k: measured.append(1) or original(own, *a, **k))
    twin = MatrixMethod(method="exact_global", method_args=BLOCKS | {"layer_floor": 0.0}, name="twin")
    matrix_run(model, tmp_path, methods=[OURS, twin], tokens=[64]).run()
    assert len(measured) == 1 + 4


def test_gradients_are_gathered_where_a_method_asks_for_them(model, tmp_path):
    taylor = MatrixMethod(method="taylor", method_args=BLOCKS)
    rows = matrix_run(model, tmp_path, methods=[taylor], tokens=[32]).run()
    assert {row["method"] for row in rows} == {"dense", "taylor"}


def test_one_corpus_alone_has_no_sums(model, tmp_path):
    legal = MatrixMethod(method="paper_a", method_args={"align": 8, "min_width": 8}, name="legal")
    rows = matrix_run(model, tmp_path, rows={"b": ROWS["b"]}, tokens=[32], variants=[legal]).run()
    assert [(row["method"], row["calibration"]) for row in rows[2::2]] == [("exact_global", "b"), ("legal", "b")]


def test_sizes_divide_over_the_corpora():
    shares = Matrix(tokens=[1536, 1792]).shares(list("abcdef"), row_length=256)
    assert shares["all", 1536] == dict.fromkeys("abcdef", 1)
    assert shares["all", 1792] == {"a": 2} | dict.fromkeys("bcdef", 1)
    assert shares["all_each", 1792] == dict.fromkeys("abcdef", 7)
    assert shares["c", 1536] == {"c": 6}


def test_sweeps_are_settings_of_paper_a():
    stages = Matrix(smoothings=["log"], min_widths=[64], variants=["uniform"]).variant_stages()
    assert [(stage.name, stage.method, stage.method_args) for stage in stages] == [
        ("paper_a_smoothing_log", "paper_a", {"smoothing": "log"}),
        ("paper_a_min_width_64", "paper_a", {"min_width": 64}),
        ("uniform", "uniform", {}),
    ]


def test_files_tables_and_figures_say_the_same(made, tmp_path):
    write_matrix(tmp_path, made)
    assert json.loads((tmp_path / "matrix.json").read_text()) == made
    with (tmp_path / "matrix.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [float(line["nll"]) for line in lines] == [row["nll"] for row in made]
    assert json.loads(lines[2]["settings"]) == BLOCKS
    assert (tmp_path / "matrix_exact_global.png").read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in tmp_path.glob("*.png")] == ["matrix_exact_global.png"]
    text = matrix_tables(made)
    for cut in mean_losses(made):
        assert f"{cut['mean']:.4f}" in text


def test_means_leave_the_own_corpus_out_of_others():
    rows = [
        {"method": "m", "calibration": "a", "size": 1, "tokens": 1, "variant": False, "evaluation": name}
        | {"loss_above_dense": loss}
        for name, loss in (("a", 0.1), ("b", 0.5), ("c", 0.3))
    ]
    (cut,) = mean_losses(rows)
    assert (cut["mean"], cut["others"], cut["worst"]) == pytest.approx((0.3, 0.4, 0.5))


def test_the_figure_shows_losses_and_how_far_they_are_from_the_best(made):
    figure = loss_matrix(made, method="exact_global")
    panels = figure.axes[:2]
    assert [axes.get_title() for axes in panels] == ["32 tokens", "64 tokens"]
    assert [label.get_text() for label in panels[0].get_xticklabels()] == ["held", "other", "mean"]
    cut = next(cut for cut in mean_losses(made) if (cut["calibration"], cut["size"]) == ("held", 32))
    assert panels[0].texts[2].get_text() == f"{round(cut['mean'], 2) + 0.0:.2f}"
    above = torch.stack([torch.tensor(axes.images[0].get_array().data) for axes in panels])
    assert torch.equal(above.amin(dim=(0, 1)), torch.zeros(3, dtype=above.dtype))


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_the_command_writes_a_matrix(tmp_path):
    save_job(tmp_path)
    settings = {"methods": ["exact_global"], "tokens": [64], "smoothings": [], "min_widths": []}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({"matrix": settings}))
    files = ("--config", tmp_path / "data.yaml", "--config", tmp_path / "job.yaml")
    run("compare", *files, "--model", tmp_path / "model", "--out", tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "matrix.json").read_text())
    assert [(row["method"], row["calibration"], row["evaluation"]) for row in rows] == [
        ("dense", None, "a"),
        ("dense", None, "b"),
        ("exact_global", "a", "a"),
        ("exact_global", "a", "b"),
    ]
    assert not (tmp_path / "out" / "compare.json").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prune_ratio": 0.0}, "`prune_ratio` of the matrix must be above 0, got 0"),
        ({"methods": []}, "`methods` of the matrix is an empty list"),
        ({"tokens": []}, "`tokens` of the matrix is an empty list"),
        ({"tokens": [0]}, "`tokens` must be .* got 0"),
        ({"methods": ["paper_a", "paper_a"]}, r"The matrix names \['paper_a'\] more than once"),
        ({"smoothings": ["cubic"]}, "`smoothing` must be one of .* got 'cubic'"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Matrix(**settings)


def test_text_that_does_not_fit_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match=r"multiples of a calibration row, 16 tokens, .* got 24"):
        matrix_run(model, tmp_path, tokens=[24]).cells()
    with pytest.raises(ValueError, match="at least one row for each of 2 corpora; got 16"):
        matrix_run(model, tmp_path, tokens=[16]).cells()
    with pytest.raises(ValueError, match=r"cannot be called \['all'\]"):
        matrix_run(model, tmp_path, rows={"all": ROWS["b"]}).cells()
    with pytest.raises(ValueError, match="'b' has 3 whole rows, and the largest size of the matrix reads 4"):
        matrix_run(model, tmp_path, rows=ROWS | {"b": corpus(2, num_rows=3)}).run()


def test_a_method_of_all_calibrations_must_be_legal(model, tmp_path):
    wide = MatrixMethod(method="paper_a", method_args={"align": 8, "min_width": 64})
    with pytest.raises(ValueError, match="min_width"):
        matrix_run(model, tmp_path, methods=[wide]).run()


def test_a_figure_needs_rows_of_its_method(made):
    with pytest.raises(ValueError, match="no row of method 'reap', only of"):
        loss_matrix(made, method="reap")


def test_the_command_needs_text(tmp_path, capsys):
    save_job(tmp_path)
    data = yaml.safe_load((tmp_path / "data.yaml").read_text())
    del data["data"]["calibration"]
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(SystemExit):
        run("compare", "--config", tmp_path / "data.yaml", "--matrix", "true", "--model", "x", "--out", tmp_path)
    assert "`matrix` needs `data.calibration` corpora, got none" in capsys.readouterr().err
