"""One-shot compression in a plain `lightning.Trainer`: calibrate, cut, pack, recover, export, report."""

import json
import math

import pytest
import torch
from tiny_runs import (
    ForeignData,
    ForeignModule,
    ForeignWithLoader,
    loader_of,
    quiet_trainer,
    save_model,
    save_text,
    text_module,
    token_batches,
)
from transformers import AutoModelForCausalLM

from callbacks import ChannelPruning, CompressionReport, ExpertCalibration, ExportPruned, Recovery
from lightning_moe.adapters.inject import AdapterConfig
from lightning_moe.adapters.storage import load_adapter
from lightning_moe.calibration.collector import collect_statistics
from lightning_moe.models.channel_experts import ChannelExperts
from lightning_moe.models.discovery import find_language_model, moe_layers
from lightning_moe.quantization.nf4 import PackedRows
from lightning_moe.records import CalibrationStatistics, PrunePlan
from lightning_moe.training.module import RecoveryModule

PREFIXES = ("lora_A", "lora_B", "lora_magnitude")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The whole job, once: (module, trainer, callbacks by name, folder)."""
    folder = save_text(tmp_path_factory.mktemp("one_shot"))
    callbacks = {
        "calibration": ExpertCalibration(file=str(folder / "statistics.safetensors")),
        "pruning": ChannelPruning(prune_ratio=0.5, method_args={"align": 8}, save_plan=str(folder / "plan.json")),
        "recovery": Recovery(adapter=AdapterConfig(expert_rank=2, router_rank=2)),
        "export": ExportPruned(folder=str(folder / "exports")),
        "report": CompressionReport(folder=str(folder / "results"), name="tiny"),
    }
    module = RecoveryModule(source=save_model(folder / "model"), gradient_checkpointing=False)
    trainer = quiet_trainer(callbacks.values())
    trainer.fit(module, datamodule=text_module(folder))
    return module, trainer, callbacks, folder


def test_the_structure_is_cut_and_packed(run):
    module, _, callbacks, _ = run
    plan = callbacks["pruning"].plans[0]
    for layer in moe_layers(module.language_model):
        assert isinstance(layer.base_experts, ChannelExperts)
        assert layer.base_experts.widths == tuple(width for width in plan.widths(layer.index) if width)
        assert isinstance(layer.base_experts.projection("gate_proj"), PackedRows)
    assert plan.num_kept == plan.shape.num_channels // 2 == 256


def test_only_adapters_are_trainable_and_the_loss_is_finite(run):
    module, trainer, _, _ = run
    trainable = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    assert trainable
    assert all(any(prefix in name for prefix in PREFIXES) for name in trainable)
    assert trainer.global_step == 2
    assert math.isfinite(trainer.callback_metrics["train_loss"])


def test_exports_reload_in_stock_transformers_with_the_logits_of_the_run(run):
    module, _, callbacks, _ = run
    assert [result.format for result in callbacks["export"].results] == ["adapter", "merged_nf4"]
    adapted, merged = callbacks["export"].results
    model = AutoModelForCausalLM.from_pretrained(adapted.base)
    load_adapter(model, folder=adapted.adapter)
    ids = torch.arange(10, 42).view(1, -1)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, module.language_model.eval()(input_ids=ids).logits)
    assert adapted.max_logit_diff < 1e-4
    # Merged adapters are packed again: compared with the packed model in memory.
    assert merged.max_logit_diff < 1e-4
    assert AutoModelForCausalLM.from_pretrained(merged.base).num_parameters() > 0


def test_rows_state_what_was_evaluated(run):
    _, _, callbacks, folder = run
    rows = [
        json.loads((folder / "results" / "stages" / f"{name}.json").read_text()) for name in ("tiny", "tiny_merged")
    ]
    for row, result in zip(rows, callbacks["export"].results, strict=True):
        assert row["prune_ratio"] == 0.5
        assert set(row["nll_per_corpus"]) == {"a", "b"}
        assert row["nll"] == pytest.approx(sum(row["nll_per_corpus"].values()) / 2)
        assert row["bytes"] == result.bytes  # without the tokenizer beside the model
        assert row["seconds"] > 0
    # The merged model has the cut model's parameters; adapters do not count as stored.
    assert rows[0]["stored_params"] == rows[1]["stored_params"]
    exports = json.loads((folder / "results" / "stages" / "tiny.exports.json").read_text())
    assert [export["format"] for export in exports] == ["adapter", "merged_nf4"]
    assert (folder / "results" / "tiny" / "report.html").is_file()


def test_statistics_and_plan_were_written_and_belong_together(run):
    _, _, callbacks, folder = run
    statistics = CalibrationStatistics.load(folder / "statistics.safetensors")
    plan = PrunePlan.load(folder / "plan.json")
    assert statistics.digest == callbacks["calibration"].statistics.digest == plan.provenance["statistics"]
    assert plan.digest == callbacks["pruning"].plans[0].digest


@pytest.mark.parametrize("entry", ["validate", "fit"])
def test_a_second_entry_point_does_nothing_again(run, entry):
    module, trainer, callbacks, folder = run
    names = [name for name, _ in module.named_parameters()]
    if entry == "fit":
        trainer.fit(module, datamodule=text_module(folder))
    else:
        trainer.limit_val_batches = 1.0
        trainer.validate(module, datamodule=text_module(folder), verbose=False)
        metrics = trainer.callback_metrics
        assert set(metrics) == {"perplexity/a", "nll/a", "perplexity/b", "nll/b", "nll"}
        assert metrics["nll"] == pytest.approx((metrics["nll/a"] + metrics["nll/b"]) / 2)
        assert metrics["perplexity/a"] == pytest.approx(math.exp(metrics["nll/a"]), rel=1e-5)
    assert [name for name, _ in module.named_parameters()] == names
    assert len(callbacks["pruning"].plans) == 1


def test_validate_alone_builds_the_cut_model(run, tmp_path):
    folder = run[3]
    module = RecoveryModule(source=str(folder / "model"), gradient_checkpointing=False)
    callbacks = [
        ExpertCalibration(file=str(folder / "statistics.safetensors")),
        ChannelPruning(prune_ratio=0.5, method_args={"align": 8}),
        Recovery(adapter=AdapterConfig(expert_rank=2, router_rank=2)),
    ]
    trainer = quiet_trainer(callbacks, limit_val_batches=1.0)
    trainer.validate(module, datamodule=text_module(folder), verbose=False)
    assert math.isfinite(trainer.callback_metrics["nll"])
    assert sum(sum(layer.base_experts.widths) for layer in moe_layers(module.language_model)) == 256


def test_ratio_0_changes_nothing_but_the_storage():
    module, other = ForeignModule(), ForeignModule()
    callbacks = [ExpertCalibration(num_batches=1), ChannelPruning(prune_ratio=0.0)]
    quiet_trainer(callbacks).fit(module, train_dataloaders=loader_of(token_batches()))
    quiet_trainer().fit(other, train_dataloaders=loader_of(token_batches()))
    assert module.losses == pytest.approx(other.losses, abs=1e-5)


class Source:
    """Where `fit` gets its training batches: each way gives (module, keyword arguments of fit)."""

    @staticmethod
    def argument(loader):
        return ForeignModule(), {"train_dataloaders": loader}

    @staticmethod
    def own(loader):
        return ForeignWithLoader(loader=loader), {}

    @staticmethod
    def datamodule(loader):
        return ForeignModule(), {"datamodule": ForeignData(loader)}


@pytest.mark.parametrize("way", [Source.argument, Source.own, Source.datamodule])
def test_calibration_from_training_batches(way):
    batches = token_batches(6)
    torch.manual_seed(3)
    module, arguments = way(loader_of(batches, shuffle=True))
    calibration = ExpertCalibration(num_batches=2)
    trainer = quiet_trainer([calibration], max_steps=3)
    trainer.fit(module, **arguments)
    used = [batch["input_ids"] for batch in calibration.loaders(trainer)["train"]]
    assert len(used) == 2
    assert calibration.statistics.corpora.keys() == {"train"}
    assert calibration.statistics.total()[0]["num_tokens"] == 2 * 2 * 16
    expected = collect_statistics(ForeignModule().lm, loaders={"train": [{"input_ids": ids} for ids in used]})
    for got, want in zip(calibration.statistics.total(), expected.total(), strict=True):
        torch.testing.assert_close(got["channel_ablation"], want["channel_ablation"])

    # Training goes on as if nobody had read before: same batches in the same order.
    torch.manual_seed(3)
    alone, arguments = way(loader_of(batches, shuffle=True))
    quiet_trainer(max_steps=3).fit(alone, **arguments)
    assert all(torch.equal(a, b) for a, b in zip(module.seen, alone.seen, strict=True))


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
def test_calibration_from_the_training_corpora_of_our_own_data_module(run):
    folder = run[3]
    data = text_module(folder, calibration=None, validation=None)
    module = RecoveryModule(source=str(folder / "model"), gradient_checkpointing=False)
    calibration = ExpertCalibration(num_batches=2)
    quiet_trainer([calibration, Recovery(adapter=AdapterConfig(expert_rank=2))], max_steps=1).fit(
        module, datamodule=data
    )
    assert calibration.statistics.total()[0]["num_tokens"] == 2 * 4 * 32
    assert data.state_dict()["num_batches"] == 1  # the reading position is the training's own


def test_adapters_on_the_16_bit_model_train_too(run):
    folder = run[3]
    module = RecoveryModule(source=str(folder / "model"), gradient_checkpointing=True)
    recovery = Recovery(quantize="none", adapter=AdapterConfig(expert_rank=2, train_norms=True))
    export = ExportPruned(folder=str(folder / "norms"), formats=["adapter", "merged", "ragged"])
    trainer = quiet_trainer([recovery, export])
    trainer.fit(module, datamodule=text_module(folder, validation=None))
    assert not any(isinstance(part, PackedRows) for part in find_language_model(module).modules())
    assert [result.format for result in export.results] == ["adapter", "merged", "ragged"]
    assert all(result.max_logit_diff < 1e-3 for result in export.results)
