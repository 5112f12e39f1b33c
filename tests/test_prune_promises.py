"""`prune` and `calibrate` refuse what they cannot keep before they work, and keep what they were told."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import random_tokens, tiny_model

from lightning_moe.allocation import ExactGlobal, build_method
from lightning_moe.allocation.budgets import Budget, spend_budget
from lightning_moe.calibration.collector import collect_statistics
from lightning_moe.commands import calibration, pruning
from lightning_moe.export.huggingface import save_ragged
from lightning_moe.models.discovery import moe_layers
from lightning_moe.models.loading import load_model
from lightning_moe.quantization.linears import quantize_model
from lightning_moe.quantization.size import read_sizes
from lightning_moe.records import CalibrationStatistics
from lightning_moe.surgery.cut import convert_experts
from lightning_moe.surgery.novices import mean_outputs

LOADERS = {name: [{"input_ids": random_tokens(batch=4, seed=seed)}] for seed, name in enumerate("ab")}
DATA = SimpleNamespace(
    calibration_dataloaders=lambda: LOADERS, tokenizer=SimpleNamespace(save_pretrained=lambda folder: None)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, one whose rows do not fit 4 bit, and statistics of both."""
    folder = tmp_path_factory.mktemp("promises")
    for name, hidden_size in (("model", 64), ("narrow", 32)):
        model = tiny_model(hidden_size=hidden_size, dtype=torch.bfloat16)
        model.save_pretrained(folder / name)
        convert_experts(model)
        collect_statistics(model, loaders=LOADERS, progress=False).save(folder / f"{name}.statistics")
    return folder


def statistics(folder, name="model"):
    return CalibrationStatistics.load(folder / f"{name}.statistics")


def prune(folder, plan, *, name="model", **options):
    plan.save(folder / "plan.json")
    settings = {"repair": False, "device": "cpu"} | options
    pruning.prune(model=str(folder / name), plan=folder / "plan.json", out=folder / "out", data=DATA, **settings)


def never(*_, **__):
    pytest.fail("worked before it checked")


@pytest.mark.parametrize(
    ("budget", "options", "message"),
    [
        (Budget(bytes=120_000), {"novices": "statistics"}, "budget of bytes, and `novices` would come on top of it"),
        (Budget(stored_params=100_000, active=0.9), {"novices": "x"}, "budget of stored_params, and `novices` would"),
        (Budget(bytes=120_000), {"quantize": "none"}, "in 4 bit .* in bfloat16, this would write 16 bit and bfloat16"),
        (
            Budget(bytes=120_000),
            {"dtype": "float32"},
            r"this would write 4 bit and float32\. Set `quantize` and `dtype`",
        ),
    ],
)
def test_another_folder_than_the_budget_was_counted_for_is_refused(budget, options, message, folder, monkeypatch):
    monkeypatch.setattr(pruning, "open_folder", never)
    sizes = read_sizes(str(folder / "model"), bits=4)
    plan = spend_budget(ExactGlobal(align=4), statistics(folder), budget=budget, sizes=sizes).plan
    with pytest.raises(ValueError, match=message):
        prune(folder, plan, **options)


def test_the_folder_that_the_budget_was_counted_for_is_written(folder):
    sizes = read_sizes(str(folder / "model"), bits=4)
    budget = Budget(bytes=120_000)
    prune(
        folder,
        spend_budget(ExactGlobal(align=4), statistics(folder), budget=budget, sizes=sizes).plan,
        dtype="bfloat16",
    )
    assert load_model(str(folder / "out"))


def test_a_hidden_size_that_does_not_fit_4_bit_is_refused_before_loading(folder, monkeypatch):
    monkeypatch.setattr(pruning, "open_folder", never)
    with pytest.raises(ValueError, match="multiple of 64, got 32"):
        prune(folder, ExactGlobal().plan(statistics(folder, "narrow"), prune_ratio=0.5), name="narrow", repair=True)


def test_novices_are_means_over_the_corpora_of_the_plan(folder):
    plan = build_method("reap").plan(statistics(folder), prune_ratio=0.5, corpora=["b"])
    prune(folder, plan, novices=folder / "model.statistics", quantize="none")
    expected = mean_outputs(statistics(folder), plan=plan, corpora=["b"])
    both = mean_outputs(statistics(folder), plan=plan)
    for layer, rows_NH, other_NH in zip(
        moe_layers(load_model(str(folder / "out"))), expected.rows, both.rows, strict=True
    ):
        assert torch.equal(layer.experts.novices, rows_NH.bfloat16())
        assert not torch.equal(layer.experts.novices, other_NH.bfloat16())
    with pytest.raises(ValueError, match="This model has novices, whose constants are not counted"):
        read_sizes(str(folder / "out"), bits=16)


def test_gradients_of_a_packed_model_are_refused_before_the_forward_pass(folder, monkeypatch):
    model = load_model(str(folder / "model"))
    convert_experts(model)
    quantize_model(model)
    save_ragged(model, folder / "packed")
    monkeypatch.setattr(calibration, "collect_streamed", never)
    with pytest.raises(ValueError, match="is packed to 4 bit"):
        calibration.calibrate(
            model=str(folder / "packed"), out=folder / "packed.statistics", data=DATA, gradients=True, device="cpu"
        )


def test_statistics_of_the_forward_pass_are_written_before_the_gradients(folder, monkeypatch):
    monkeypatch.setattr(calibration, "collect_gradients", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        calibration.calibrate(
            model=str(folder / "model"), out=folder / "forward", data=DATA, gradients=True, device="cpu"
        )
    assert CalibrationStatistics.load(folder / "forward").digest == statistics(folder).digest
