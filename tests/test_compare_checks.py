"""What a comparison refuses before it works, what tells its rows apart, and what it does not keep."""

import weakref
from dataclasses import replace

import pytest
import torch
from compare_runs import BLOCKS, calibration, comparison, save_tiny
from tiny_models import tiny_model

from lightning_moe.evaluation.compare import Grid, GridMethod, bench, calibrations
from lightning_moe.evaluation.compare.digests import model_digest
from lightning_moe.evaluation.compare.tables import comparison_table, mean_rows
from lightning_moe.models.loading import load_model
from lightning_moe.reporting.comparison import Comparison

OURS = GridMethod(method="exact_global", method_args=BLOCKS)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("checks") / "model")


def grid(*methods, ratios=(0.5,), **settings):
    return Grid(methods=list(methods), ratios=list(ratios), **settings).rows()


def test_a_row_that_is_found_says_nothing_of_another(model, tmp_path):
    """A method's own uniform row and `uniform` with the same criterion are one cut under two names."""
    own, uniform = grid(replace(OURS, uniform_row=True))[1:], GridMethod(method="uniform")
    uniform = replace(uniform, method_args=own[0].method_args)
    rows = comparison(model, tmp_path).run([*own, *grid(uniform)])
    assert [row["method"] for row in rows] == ["dense", "exact_global", "uniform"]
    assert rows[1]["nll"] == rows[2]["nll"]
    assert [row["export"] for row in rows] == [None, "uniform width", None]
    assert [row["export"] for row in comparison(model, tmp_path).run([*own, *grid(uniform)])] == [
        None,
        "uniform width",
        None,
    ]


def test_a_ratio_that_cannot_be_reached_is_refused_before_any_cut(model, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "evaluate_stage", lambda *_, **__: pytest.fail("a row was measured"))
    wide = GridMethod(method="paper_a", method_args={"align": 8, "min_width": 64})
    with pytest.raises(ValueError, match="min_width"):
        comparison(model, tmp_path).run(grid(OURS, wide))
    with pytest.raises(ValueError, match="min_width"):
        comparison(model, tmp_path).run(grid(OURS, replace(wide, calibrations=2)))


def test_whole_experts_that_go_in_stages_are_not_repaired(model, tmp_path):
    twice = replace(OURS, calibrations=2, repair=[True])
    specs = [replace(spec, repair=True) for spec in grid(GridMethod(method="frequency", calibrations=2))]
    rows = comparison(model, tmp_path).run([*specs, *grid(twice)])
    assert [row["repair"] for row in rows] == [False, False, True]


def test_a_model_in_memory_is_given_up_before_the_last_reload(model, tmp_path, monkeypatch):
    cuts, held = [], []
    cut_copy, evaluate_stage = bench.cut_copy, bench.evaluate_stage
    monkeypatch.setattr("lightning_moe.evaluation.compare.run.cut_copy", lambda *a, **k: remember(cut_copy(*a, **k)))

    def remember(cut):
        cuts.append(weakref.ref(cut.model))
        return cut

    def watched(name, **settings):
        held.append((name, cuts[-1]() is not None if cuts else None))
        return evaluate_stage(name, **settings)

    monkeypatch.setattr(bench, "evaluate_stage", watched)
    comparison(model, tmp_path).run(grid(replace(OURS, bits=[16, 4])))
    assert held == [
        ("dense", None),
        ("dense_nf4", False),
        ("exact_global_50_s0", True),
        ("exact_global_50_nf4_s0", False),
    ]


def test_another_device_is_another_row(model, tmp_path):
    run = comparison(model, tmp_path)
    elsewhere = replace(run.measures, device="cuda")
    assert run.measures.settings != elsewhere.settings
    assert elsewhere.settings == replace(run.measures, device=torch.device("cuda", 0)).settings


def test_weights_that_are_not_safetensors_are_refused(tmp_path):
    tiny = tiny_model()
    tiny.config.save_pretrained(tmp_path)
    torch.save(tiny.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="has no weights in safetensors files"):
        model_digest(str(tmp_path))


def test_statistics_without_their_note_are_gathered_again(model, tmp_path, monkeypatch):
    """A run that ends between the two files leaves no note on other statistics."""
    dense = load_model(model, dtype="float32")

    def sample(number):
        file = tmp_path / "s.safetensors"
        return calibrations.SampleCalibration(model=dense, loaders=calibration(number), file=file, origin={"m": 1})

    first = sample(0).statistics.digest

    def killed(*_args):
        raise KeyboardInterrupt

    second = sample(1)
    with monkeypatch.context() as patched:
        patched.setattr(calibrations, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            second.statistics  # noqa: B018
    assert sample(0).statistics.digest == first


def row_of(name, *, nll, sample=0, method="m", **settings):
    columns = {"name": name, "method": method, "ratio": 0.5, "bits": 16, "repair": False, "sample": sample, "nll": nll}
    return columns | {"settings": settings}


DENSE = row_of("dense", nll=2.0, method="dense") | {"ratio": 0.0}


def test_other_settings_are_no_other_sample():
    rows = [DENSE]
    for sample in (0, 1):
        rows += [row_of(f"{name}_s{sample}", nll=nll, sample=sample, x=name) for name, nll in (("a", 3.0), ("b", 5.0))]
    means = mean_rows(rows)[1:]
    assert [(row["nll"], row["num_samples"], row["variant"]) for row in means] == [(3.0, 2, "a_s0"), (5.0, 2, "b_s0")]
    assert [line.split()[4] for line in comparison_table(rows).splitlines()[3:]] == ["a_s0", "b_s0"]


def test_seeds_of_samples_are_one_method_and_of_one_sample_several():
    samples = [row_of(f"r_s{seed}", nll=3.0 + seed, sample=seed, seed=seed) for seed in (0, 1)]
    (mean,) = mean_rows([DENSE, *samples])[1:]
    assert (mean["nll"], mean["num_samples"]) == (3.5, 2)
    assert "variant" not in mean
    again = [row_of(f"r_{seed}", nll=3.0 + seed, seed=seed) for seed in (0, 1)]
    assert [(row["nll"], row["variant"]) for row in mean_rows([DENSE, *again])[1:]] == [(3.0, "r_0"), (4.0, "r_1")]


def test_a_baseline_of_two_settings_is_none():
    rows = [DENSE, row_of("a", nll=3.0, x=1), row_of("b", nll=5.0, x=2), row_of("c", nll=4.0, method="n")]
    assert all("difference" not in row for row in mean_rows(rows, baseline="m"))
    assert mean_rows(rows, baseline="n")[1]["difference"] == -1.0


def test_a_report_does_not_average_settings_either():
    rows = [DENSE, *(row_of(name, nll=nll, sample=nll, x=name) for name, nll in (("a", 3), ("b", 5)))]
    variants = Comparison.from_rows(rows).variants
    assert [(variant.setting.variant, len(variant.rows)) for variant in variants] == [("", 1), ("b", 1)]
