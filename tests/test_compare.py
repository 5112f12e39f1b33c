"""Comparisons: each row is what the pieces give, shares what it can, and is made once."""

import copy
import csv
import json
from dataclasses import replace

import pytest
import torch
from compare_runs import BLOCKS, LISTS, calibration, comparison, save_tiny
from tiny_runs import token_batches

import lightning_moe
from lightning_moe.allocation import build_method
from lightning_moe.calibration.collector import collect_statistics
from lightning_moe.evaluation.compare import Grid, GridMethod, Measures, StageSpec, bench, calibrations, make_row
from lightning_moe.evaluation.compare.digests import model_digest, text_digest
from lightning_moe.evaluation.compare.tables import comparison_table, mean_rows, write_comparison
from lightning_moe.evaluation.perplexity import evaluate_model
from lightning_moe.models.loading import load_model
from lightning_moe.records import CalibrationStatistics, PrunePlan
from lightning_moe.surgery.cut import apply_plan
from lightning_moe.surgery.repair import plan_repair

OURS = GridMethod(method="exact_global", method_args=BLOCKS)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("compare") / "model")


@pytest.fixture(scope="module")
def dense(model):
    return load_model(model, dtype="float32")


@pytest.fixture
def made(monkeypatch):
    """Names of the rows that were measured, not reused."""
    measured = []
    original = bench.evaluate_stage

    def counted(name, **settings):
        measured.append(name)
        return original(name, **settings)

    monkeypatch.setattr(bench, "evaluate_stage", counted)
    return measured


def grid(*methods, ratios=(0.5,), **settings):
    return Grid(methods=list(methods), ratios=list(ratios), **settings).rows()


def test_a_row_is_the_cut_model_evaluated(model, dense, tmp_path):
    """Against the pieces by hand; the tiny model's weights are bfloat16 numbers, so that only the repair is rounded."""
    rows = comparison(model, tmp_path, keep=["exact_global_50_s1"]).run(grid(OURS, repair=[False, True], samples=2))
    by_name = {row["name"]: row for row in rows}
    statistics = collect_statistics(dense, loaders=calibration(1))
    plan = build_method("exact_global", **BLOCKS).plan(statistics, prune_ratio=0.5)
    cut = copy.deepcopy(dense)
    apply_plan(cut, plan=plan)
    assert by_name["exact_global_50_s1"]["nll"] == pytest.approx(evaluate_model(cut, loaders=LISTS).nll, rel=1e-6)
    repaired = copy.deepcopy(dense)
    apply_plan(repaired, plan=plan, repair=plan_repair(dense, plan=plan, loaders=calibration(1)))
    for layer in repaired.model.layers:
        rows_CH = layer.mlp.experts.down_proj.weight
        rows_CH.data = rows_CH.data.bfloat16().float()
    assert by_name["exact_global_50_repaired_s1"]["nll"] == pytest.approx(evaluate_model(repaired, loaders=LISTS).nll)
    assert by_name["dense"]["nll"] == pytest.approx(evaluate_model(dense, loaders=LISTS).nll)
    assert by_name["exact_global_50_s0"]["nll"] != by_name["exact_global_50_s1"]["nll"]
    folder = tmp_path / "models" / "exact_global_50_s1"
    on_disk = sum(
        file.stat().st_size for file in folder.iterdir() if file.suffix == ".safetensors" or "config" in file.name
    )
    assert by_name["exact_global_50_s1"]["bytes"] == on_disk
    assert [child.name for child in (tmp_path / "models").iterdir()] == ["exact_global_50_s1"]


def test_rows_are_a_list_of_plain_numbers(model, tmp_path):
    nf4 = replace(OURS, bits=[16, 4], repair=[True, "after_nf4"])
    rows = comparison(model, tmp_path, agreement=True).run(grid(nf4, "reap"))
    write_comparison(tmp_path, rows)
    assert json.loads((tmp_path / "compare.json").read_text()) == rows
    keys = "name method ratio bits repair sample nll nll_per_corpus stored_params active_params bytes seconds kl"
    assert all(set(keys.split()) <= row.keys() for row in rows)
    assert [row["name"] for row in rows[:2]] == ["dense", "dense_nf4"]
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert rows[0]["top1_agreement"] == 1
    assert [row["repair"] for row in rows] == [False, False, True, True, "after_nf4", False]
    sizes = {row["name"]: row["bytes"] for row in rows}
    assert sizes["exact_global_50_repaired_nf4_s0"] < sizes["exact_global_50_repaired_s0"] < sizes["dense"]
    assert rows[2]["stored_params"] == rows[3]["stored_params"]
    assert not (tmp_path / "models").exists()
    with (tmp_path / "compare.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [float(row["nll_per_corpus.held"]) for row in read] == [row["nll_per_corpus"]["held"] for row in rows]


def test_make_row_is_one_row_from_a_model_and_a_plan(model, dense, tmp_path):
    statistics = collect_statistics(dense, loaders=calibration(0))
    plan = build_method("paper_a", **BLOCKS, min_width=8).plan(statistics, prune_ratio=0.25)
    before = copy.deepcopy(dense.state_dict())
    measures = Measures(held_out=LISTS)
    row = make_row(dense, name="one", plan=plan, measures=measures, folder=tmp_path / "model")
    assert row["prune_ratio"] == 0.25
    assert not (tmp_path / "model").exists()
    assert all(torch.equal(before[name], value) for name, value in dense.state_dict().items())
    paper = GridMethod(method="paper_a", method_args={**BLOCKS, "min_width": 8})
    (_, same) = comparison(model, tmp_path).run(grid(paper, ratios=[0.25]))
    assert same["nll"] == row["nll"]
    with pytest.raises(ValueError, match="`repair: True` needs `calibration` text, got none"):
        make_row(dense, name="one", plan=plan, measures=measures, folder=tmp_path / "model", repair=True)


def test_rows_are_made_once(model, tmp_path, made, caplog):
    caplog.set_level("INFO")
    first = comparison(model, tmp_path).run(grid(OURS, samples=2))
    assert made == ["dense", "exact_global_50_s0", "exact_global_50_s1"]
    again = comparison(model, tmp_path).run(grid(OURS, "reap", samples=2))
    assert made[3:] == ["reap_50_s0", "reap_50_s1"]
    assert again[:3] == first
    assert "3 of 5 rows are reused" in caplog.text
    renamed = comparison(model, tmp_path).run(grid(replace(OURS, name="ours"), ratios=[0.5, 0.25]))
    assert made[5:] == ["ours_25_s0"]
    assert renamed[1]["nll"] == first[1]["nll"]
    assert (renamed[1]["name"], renamed[1]["method"]) == ("ours_50_s0", "ours")
    comparison(model, tmp_path, reuse=False).run(grid(OURS))
    assert made[6:] == ["dense", "exact_global_50_s0"]


def test_rows_are_made_again_when_something_changed(model, tmp_path, made, monkeypatch):
    rows = grid(OURS)
    comparison(model, tmp_path).run(grid(replace(OURS, method_args={"align": 16})))
    comparison(model, tmp_path).run(rows)
    comparison(model, tmp_path, held_out={"held": LISTS["held"]}).run(rows)
    comparison(model, tmp_path, agreement=True).run(rows)
    monkeypatch.setattr(lightning_moe, "__version__", "0.0.0")
    comparison(model, tmp_path).run(rows)
    whole, cut = ["dense", "exact_global_50_s0"], ["exact_global_50_s0"]
    assert made == [*whole, *cut, *whole, *whole, *whole]


def test_a_kept_model_that_is_gone_is_made_again(model, tmp_path, made):
    rows = grid(OURS)
    comparison(model, tmp_path).run(rows)
    comparison(model, tmp_path, keep=["exact_global_50_s0"]).run(rows)
    comparison(model, tmp_path, keep=["exact_global_50_s0"]).run(rows)
    assert made == ["dense", "exact_global_50_s0", "exact_global_50_s0"]


def test_rows_of_another_model_are_not_mixed(model, tmp_path):
    comparison(model, tmp_path / "out").run([])
    other = save_tiny(tmp_path / "other", seed=1)
    assert model_digest(other) != model_digest(model)
    with pytest.raises(ValueError, match=r"holds rows of another model: 'dense' is of .* Give another `out`"):
        comparison(other, tmp_path / "out").run([])


def test_one_pass_of_each_kind_a_sample(model, tmp_path, monkeypatch):
    """Statistics and Gram matrices are taken once a sample, whatever the number of rows; statistics also for later."""
    calls = []

    def count(name):
        original = vars(calibrations)[name]
        monkeypatch.setattr(calibrations, name, lambda *a, **k: calls.append(name) or original(*a, **k))

    for name in ("collect_statistics", "iterate_grams", "collect_gradients"):
        count(name)
    rows = grid(
        replace(OURS, repair=[True]), GridMethod(method="uniform", method_args=BLOCKS, repair=[True]), samples=2
    )
    comparison(model, tmp_path).run(rows)
    assert sorted(calls) == ["collect_statistics"] * 2 + ["iterate_grams"] * 2
    calls.clear()
    comparison(model, tmp_path, gradients=True).run(grid(GridMethod(method="taylor", method_args=BLOCKS)))
    assert calls == ["collect_gradients"]  # added to what was gathered before
    comparison(model, tmp_path).run(grid("reap"))
    assert len(calls) == 1
    assert "loss_taylor" in CalibrationStatistics.load(tmp_path / "statistics_0.safetensors").corpora["a"][0]


def test_grams_that_do_not_fit_are_taken_for_each_cut(dense):
    sample = calibrations.SampleCalibration(model=dense, loaders=calibration(0), file=None, origin={}, memory_gb=1e-9)
    assert sample.grams is None


def test_given_statistics_are_used_and_decide(model, dense, tmp_path, made):
    first, second = (collect_statistics(dense, loaders=calibration(sample)) for sample in (0, 5))
    rows = grid(OURS)
    comparison(model, tmp_path, statistics=first).run(rows)
    comparison(model, tmp_path, statistics=second).run(rows)
    assert made == ["dense", "exact_global_50_s0", "exact_global_50_s0"]
    assert not list(tmp_path.glob("statistics*"))


def test_statistics_of_another_model_are_refused_at_once(dense, tmp_path, made):
    other = save_tiny(tmp_path / "other", seed=1)
    statistics = collect_statistics(dense, loaders=calibration(0))
    with pytest.raises(ValueError, match=r"statistics were gathered on another model than .* leave `statistics` out"):
        comparison(other, tmp_path / "out", statistics=statistics).run(grid(OURS))
    assert made == []


def test_staged_cuts_and_novices(model, tmp_path):
    twice = replace(OURS, calibrations=2, repair=[True])
    mone = GridMethod(method="mone", novices=True)
    rows = comparison(model, tmp_path).run(grid(OURS, twice, "mone", mone))
    by_name = {row["name"]: row for row in rows}
    plans = [PrunePlan.load(tmp_path / "plans" / f"exact_global_50{name}_s0.json") for name in ("", "_c2_repaired")]
    assert plans[0].num_kept == plans[1].num_kept
    assert by_name["exact_global_50_c2_repaired_s0"]["calibrations"] == 2
    assert by_name["mone_50_novices_s0"]["nll"] != by_name["mone_50_s0"]["nll"]
    # What stays of 8 experts: a row of 64 numbers each, and their routers' rows.
    assert by_name["mone_50_novices_s0"]["stored_params"] - by_name["mone_50_s0"]["stored_params"] == 8 * (64 + 64)


def test_the_text_counts_and_not_its_batches():
    (batch,) = token_batches(1)
    halves = [{key: value[part : part + 1] for key, value in batch.items()} for part in range(2)]
    assert text_digest({"a": [batch]}) == text_digest({"a": halves})
    assert text_digest({"a": [batch]}) != text_digest({"b": [batch]})
    assert text_digest({"a": [batch]}) != text_digest({"a": halves[::-1]})
    masked = batch | {"attention_mask": torch.zeros_like(batch["attention_mask"])}
    assert text_digest({"a": [masked]}) != text_digest({"a": [batch]})


def row_of(name, *, nll, sample=0, **columns):
    return {
        "name": name,
        "method": "m",
        "ratio": 0.5,
        "bits": 16,
        "repair": True,
        "sample": sample,
        "nll": nll,
    } | columns


def test_means_and_spreads_by_hand():
    dense = row_of("dense", nll=2.0) | {"method": "dense", "ratio": 0.0, "repair": False}
    tasks = {"one": {"acc": 0.5}, "two": {"acc": 0.7}}
    rows = [
        dense,
        row_of("a", nll=2.1, tasks=tasks),
        row_of("b", nll=2.3, sample=1, tasks=tasks),
        row_of("c", nll=9, bits=4),
    ]
    means = mean_rows(rows)
    assert [row["num_samples"] for row in means] == [1, 2, 1]
    assert means[1]["loss"] == pytest.approx(0.2)
    assert means[1]["spread"] == pytest.approx(0.02**0.5)  # of 0.1 and 0.3: 2 * 0.1^2 / 1
    assert means[1]["accuracy"] == pytest.approx(0.6)
    assert means[2]["spread"] is None
    table = comparison_table(rows).splitlines()
    assert [word in table[0] for word in ("cut %", "above dense", "+-", "tasks %", "KL")] == [True] * 4 + [False]
    assert table[3].split() == ["m", "50", "16", "yes", "2", "2.2000", "+0.2000", "0.1414", "60.0"]
    assert len(table) == 5


def test_rows_against_a_baseline_sample_by_sample():
    plain = {"method": "base", "repair": False}
    dense = row_of("dense", nll=2.0) | {"method": "dense", "ratio": 0.0, "repair": False}
    base = [
        row_of("a", nll=3.0) | plain,
        row_of("b", nll=3.2, sample=1) | plain,
        row_of("c", nll=2.7) | {"method": "base"},
    ]
    ours = [row_of("d", nll=2.5), row_of("e", nll=2.9, sample=1), row_of("f", nll=2.9, sample=0, bits=4)]
    by_key = {
        (row["method"], row["repair"], row["bits"]): row for row in mean_rows([dense, *base, *ours], baseline="base")
    }
    # -0.5 and -0.3
    assert by_key["m", True, 16]["difference"] == pytest.approx(-0.4)
    assert by_key["m", True, 16]["difference_spread"] == pytest.approx(0.02**0.5)
    assert by_key["base", False, 16]["difference"] == 0
    assert by_key["base", True, 16]["difference"] == pytest.approx(-0.3)
    assert "difference" not in by_key["m", True, 4]


def test_two_rows_of_one_name(model, tmp_path):
    twice = [StageSpec(name="a", prune_ratio=ratio, method_args=BLOCKS) for ratio in (0.25, 0.5)]
    with pytest.raises(ValueError, match=r"needs its own name, .* \['a'\] come more than once"):
        comparison(model, tmp_path).run(twice)
