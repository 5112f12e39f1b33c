"""The command `export` and the callback: provenance, results, and what travels beside the weights."""

import json

import pytest
from random_plans import uniform_plan
from tiny_models import tiny_model
from tiny_runs import quiet_trainer, save_model, save_text, text_module
from transformers import AutoTokenizer

from callbacks import ChannelPruning, ExpertCalibration, ExportPruned
from lightning_moe.assets import asset_path
from lightning_moe.commands.exporting import export
from lightning_moe.export.folders import open_folder
from lightning_moe.export.manifest import read_manifest
from lightning_moe.export.streaming import prune_folder
from lightning_moe.models.loading import load_model
from lightning_moe.training.module import RecoveryModule


def test_the_shipped_model_becomes_a_smaller_stock_checkpoint(tmp_path):
    """Pruned to half of each expert, exported with its tokenizer, chat template and results."""
    shipped = load_model("asset:small_moe")
    plan = uniform_plan(shipped, width=64)
    tokenizer = AutoTokenizer.from_pretrained(asset_path("small_moe"))
    prune_folder(
        open_folder("asset:small_moe"),
        plan=plan,
        out=tmp_path / "pruned",
        quantize=False,
        beside=tokenizer.save_pretrained,
    )
    (tmp_path / "results" / "stages").mkdir(parents=True)
    row = {"name": "half", "nll": 3.25, "prune_ratio": 0.5, "nll_per_corpus": {"code": 3.0}}
    (tmp_path / "results" / "stages" / "half.json").write_text(json.dumps(row))
    out = tmp_path / "out"
    export(model=str(tmp_path / "pruned"), out=str(out), formats=["uniform"], results=str(tmp_path / "results"))
    folder = out / "uniform"
    assert (folder / "chat_template.jinja").read_text() == asset_path("small_moe/chat_template.jinja").read_text()
    assert AutoTokenizer.from_pretrained(folder)("print").input_ids == tokenizer("print").input_ids
    config = json.loads((folder / "config.json").read_text())
    assert (config["moe_intermediate_size"], config["dtype"]) == (64, "bfloat16")
    assert "| half |        0.50 |           3.2500 |" in (folder / "README.md").read_text()
    manifest = read_manifest(folder)
    assert manifest is not None
    assert (manifest.source, manifest.base_model) == (str(tmp_path / "pruned"), "asset:small_moe")
    assert [origin.digest for origin in manifest.plans] == [plan.digest]
    assert {"tokenizer.json", "chat_template.jinja"} <= manifest.files.keys()
    (exported,) = json.loads((out / "exports.json").read_text())
    beside = [size for name, size in manifest.files.items() if name.startswith(("tokenizer", "chat_template"))]
    assert exported["bytes"] == manifest.bytes - sum(beside)
    assert exported["engines"] == ["vLLM", "llama.cpp"]


def test_missing_results_are_refused_before_the_work(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="There are no rows of results below"):
        export(
            model=str(tmp_path / "model"), out=str(tmp_path / "out"), formats=["ragged"], results=str(tmp_path / "none")
        )
    assert not (tmp_path / "out").exists()


def test_the_callback_notes_source_and_plan(tmp_path):
    save_model(tmp_path / "model")
    save_text(tmp_path)
    pruning = ChannelPruning(prune_ratio=0.5, method="uniform", repair=False)
    exporting = ExportPruned(folder=str(tmp_path / "export"), formats=["uniform", "ragged"])
    source = str(tmp_path / "model")
    callbacks = [ExpertCalibration(), pruning, exporting]
    quiet_trainer(callbacks, max_steps=1).fit(RecoveryModule(source=source), datamodule=text_module(tmp_path))
    for name in ("uniform", "ragged"):
        manifest = read_manifest(tmp_path / "export" / name)
        assert manifest is not None
        assert manifest.source == source
        (origin,) = manifest.plans
        assert (origin.digest, origin.method, origin.corpora) == (pruning.plans[0].digest, "uniform", "a")
        assert origin.statistics == pruning.plans[0].provenance["statistics"]
    assert [result.format for result in exporting.results] == ["uniform", "ragged"]
