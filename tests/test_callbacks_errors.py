"""What the callbacks refuse, and that they do so before the first batch."""

import pytest
import torch
from lightning import LightningModule
from tiny_models import tiny_model
from tiny_runs import (
    ForeignModule,
    ForeignWithLoader,
    loader_of,
    quiet_trainer,
    save_model,
    save_text,
    text_module,
    token_batches,
)

from callbacks import ChannelPruning, CompressionReport, ExpertCalibration, ExpertPruning, ExportPruned, Recovery
from lightning_moe.adapters.inject import AdapterConfig
from lightning_moe.allocation import build_method
from lightning_moe.calibration.collector import collect_statistics
from lightning_moe.models.discovery import moe_layers

ADAPTER = AdapterConfig(expert_rank=2, router_rank=2)


def refused(callbacks, *, match, module=None, **trainer_settings):
    """`fit` raises, and not a single batch was trained on."""
    module = ForeignModule() if module is None else module
    with pytest.raises(ValueError, match=match):
        quiet_trainer(callbacks, **trainer_settings).fit(module, train_dataloaders=loader_of(token_batches()))
    assert module.seen == []


def statistics_of(model):
    return collect_statistics(model, loaders={"train": token_batches(2)}, progress=False)


def calibrate():
    return ExpertCalibration(num_batches=1)


@pytest.mark.parametrize(
    ("callbacks", "match"),
    [
        (lambda: [ChannelPruning(prune_ratio=0.5)], "ChannelPruning needs a ExpertCalibration before it"),
        (lambda: [ChannelPruning(schedule=[(1, 0.5)])], "ChannelPruning needs a ExpertCalibration before it"),
        (
            lambda: [ChannelPruning(prune_ratio=0.5), calibrate()],
            "ExpertCalibration must stand before ChannelPruning in `trainer.callbacks`",
        ),
        (
            lambda: [calibrate(), Recovery(adapter=ADAPTER), ChannelPruning(prune_ratio=0.5)],
            "ChannelPruning must stand before Recovery",
        ),
        (lambda: [Recovery(adapter=ADAPTER), calibrate()], "ExpertCalibration must stand before Recovery"),
        (
            lambda: [calibrate(), Recovery(adapter=ADAPTER), ExpertPruning(prune_ratio=0.5)],
            "ExpertPruning must stand before Recovery",
        ),
        (
            lambda: [ExpertCalibration(window=2), ChannelPruning(schedule=[(0, 0.25), (1, 0.5)])],
            "`schedule` cuts at step 0, and `window: 2` has seen no batch by then",
        ),
        (
            lambda: [ExpertCalibration(window=2), ChannelPruning(prune_ratio=0.5)],
            "`window: 2` is for scheduled cuts, and no callback here has a `schedule`",
        ),
        (
            lambda: [calibrate(), ExpertPruning(schedule=[(1, 0.9)])],
            "prune ratio 0.9 leaves 1 of 8 experts, but 2 must stay",
        ),
        (lambda: [ExportPruned(folder="x")], "ExportPruned needs a Recovery before it"),
        (
            lambda: [CompressionReport(folder="x", name="y")],
            "CompressionReport needs a ExportPruned before it in `trainer.callbacks`",
        ),
        (
            lambda: [ExportPruned(folder="x", formats=["ragged"]), CompressionReport(folder="x", name="y")],
            "give a TextDataModule with `validation`",
        ),
        (lambda: [ExpertCalibration()], r"say how many with `ExpertCalibration\(num_batches=...\)`"),
    ],
)
def test_lists_that_cannot_work(callbacks, match):
    refused(callbacks(), match=match)


def test_statistics_of_another_model(tmp_path):
    statistics_of(tiny_model(seed=1)).save(tmp_path / "s.safetensors")
    refused(
        [ExpertCalibration(file=str(tmp_path / "s.safetensors"))], match="were made on another model. Name another file"
    )


@pytest.mark.parametrize("repair", [False, True])
def test_a_plan_for_another_model(tmp_path, repair):
    plan = build_method("exact_global", align=8).plan(statistics_of(tiny_model(seed=1)), prune_ratio=0.5)
    plan.save(tmp_path / "plan.json")
    pruning = ChannelPruning(plan_file=str(tmp_path / "plan.json"), repair=repair)
    refused([calibrate(), pruning], match="The plan was made for another model: router_digest of model")


def test_nan_in_weights():
    module = ForeignModule()
    moe_layers(module.lm)[1].experts.down_proj.data[:, 0, 0] = float("nan")
    refused(
        [calibrate(), ChannelPruning(prune_ratio=0.5)],
        match=r"layers.1.mlp.experts: NaN or infinity in batch 1 of corpus 'train'",
        module=module,
    )


def test_precision_that_would_cast_the_adapters():
    refused([Recovery(adapter=ADAPTER)], match="`precision: bf16-true` would cast them", precision="bf16-true")


class NoModel(ForeignModule):
    def __init__(self):
        super().__init__()
        self.lm = torch.nn.Linear(2, 2)


def test_a_module_without_a_transformers_model():
    refused([calibrate()], match="Expected exactly one transformers model inside NoModel, found 0", module=NoModel())


@pytest.mark.parametrize(
    ("loader", "match"),
    [
        (iter(token_batches()), r"use up the first 1 batches of a list_iterator, which can be read only once"),
        (loader_of([torch.zeros(2, 4, dtype=torch.int64)]), "batches that are dicts with `input_ids`, got Tensor"),
        ({"a": loader_of(token_batches()), "b": loader_of(token_batches())}, "dicts with `input_ids`, got dict"),
    ],
)
def test_training_batches_that_cannot_be_calibrated_on(loader, match):
    module = ForeignWithLoader(loader=loader)
    with pytest.raises(ValueError, match=match):
        quiet_trainer([calibrate()]).fit(module)
    assert module.seen == []


class Validated(ForeignModule):
    def validation_step(self, batch, batch_idx):
        raise AssertionError("nothing is validated")


def test_no_training_batches_at_all(tmp_path):
    """Statistics of the uncut model are there, and the second cut needs those of the model after the first."""
    file, module = tmp_path / "s.safetensors", Validated()
    statistics_of(module.lm).save(file)
    pruning = [ExpertPruning(prune_ratio=0.25), ChannelPruning(prune_ratio=0.5, repair=False)]
    trainer = quiet_trainer([ExpertCalibration(file=str(file), num_batches=1), *pruning], limit_val_batches=1)
    with pytest.raises(ValueError, match="There are no training batches to calibrate on"):
        trainer.validate(module, dataloaders=loader_of(token_batches()))


class Rebuilding(LightningModule):
    """Builds a new model each time it is asked, which Lightning forbids."""

    def configure_model(self):
        self.lm = tiny_model().train()

    def training_step(self, batch, batch_idx):
        raise AssertionError("nothing is trained")

    def train_dataloader(self):
        return loader_of(token_batches())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


@pytest.mark.parametrize(
    "callbacks", [lambda: [calibrate(), ChannelPruning(prune_ratio=0.5)], lambda: [Recovery(adapter=ADAPTER)]]
)
def test_a_model_that_is_built_again_after_the_cut(callbacks):
    with pytest.raises(ValueError, match="was used on another model"):
        quiet_trainer(callbacks()).fit(Rebuilding())


def test_a_callback_for_two_models():
    calibration = calibrate()
    quiet_trainer([calibration], max_steps=1).fit(ForeignModule(), train_dataloaders=loader_of(token_batches()))
    refused([calibration], match="This ExpertCalibration was used on another model. Make a new one")


def test_a_plan_without_repair_needs_no_calibration(tmp_path):
    plan = build_method("exact_global", align=8).plan(statistics_of(tiny_model()), prune_ratio=0.5)
    plan.save(tmp_path / "plan.json")
    module = ForeignModule()
    pruning = ChannelPruning(plan_file=str(tmp_path / "plan.json"), repair=False)
    quiet_trainer([pruning]).fit(module, train_dataloaders=loader_of(token_batches()))
    assert sum(sum(layer.experts.widths) for layer in moe_layers(module.lm)) == plan.num_kept
    assert len(module.seen) == 2


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            lambda: ChannelPruning(prune_ratio=0.5, schedule=[(1, 0.5)]),
            "exactly one of `prune_ratio`, `keep_ratio`, `sch",
        ),
        (lambda: ChannelPruning(), "exactly one of `prune_ratio`, `keep_ratio`, `schedule` and `plan_file`, got"),
        (lambda: ChannelPruning(prune_ratio=0.5, keep_ratio=0.5), "exactly one of .*'keep_ratio': 0.5.*`null`"),
        (lambda: ChannelPruning(keep_ratio=0.5, plan_file="x"), "exactly one of .*'keep_ratio': 0.5"),
        (lambda: ChannelPruning(keep_ratio=0.0), r"`keep_ratio` must be in \(0, 1\], got 0.0"),
        (lambda: ChannelPruning(prune_ratio=1.5), r"`prune_ratio` must be in \[0, 1\), got 1.5"),
        (lambda: ChannelPruning(prune_ratio=-0.1), r"`prune_ratio` must be in \[0, 1\), got -0.1"),
        (
            lambda: ChannelPruning(prune_ratio=0.5, method="nonsense"),
            "one of .'exact_global', .*'paper_a'.*got 'nonsense'",
        ),
        (lambda: ChannelPruning(prune_ratio=0.5, method_args={"aling": 8}), r"has the settings .*got \['aling'\]"),
        (lambda: ExpertCalibration(num_batches=0), "`num_batches` must be a whole number >= 1, got 0"),
        (lambda: ExpertCalibration(num_batches=True), "`num_batches` must be a whole number >= 1, got True"),
        (lambda: ExpertCalibration(window=0), "`window` must be a whole number >= 1, got 0"),
        (lambda: ExpertCalibration(window=1.5), r"`window` must be a whole number >= 1, got 1\.5"),
        (lambda: ChannelPruning(prune_ratio=0.5, repair_memory_gb=-1), "`repair_memory_gb` must be a number .* got -1"),
        (
            lambda: ChannelPruning(prune_ratio=0.5, repair_memory_gb="4"),
            "`repair_memory_gb` must be a number .* got '4'",
        ),
        (lambda: ExpertPruning(), "exactly one of `prune_ratio`, `keep_ratio` and `schedule`, got"),
        (
            lambda: ExpertPruning(prune_ratio=0.5, method="exact_global"),
            "needs a method that drops whole experts, such as 'reap', got 'exact_global'",
        ),
        (lambda: Recovery(quantize="int8"), "`quantize` must be 'nf4' or 'none', got 'int8'"),
        (lambda: ExportPruned(folder="x", formats=["gguf"]), "Unknown export format 'gguf'. Known: adapter"),
        (lambda: ExportPruned(folder="x", formats=[]), "Name at least one export format of adapter"),
        (lambda: ExportPruned(folder="x", formats=["nf4", "ragged"]), "must be the last"),
        (lambda: CompressionReport(folder="x", name="a/b"), "must be a plain file name, got 'a/b'"),
    ],
)
def test_constructors_refuse(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_keep_ratio_is_the_other_word_for_one_cut():
    assert ChannelPruning(keep_ratio=0.9).prune_ratio == ChannelPruning(prune_ratio=0.1).prune_ratio == 0.1
    assert ChannelPruning(schedule=[(1, 0.5)]).prune_ratio is None


def test_hooks_are_removed_after_an_exception():
    module = ForeignModule()

    class Broken(ChannelPruning):
        def on_train_batch_start(self, *args):
            raise RuntimeError("in the middle")

    pruning = Broken(schedule=[(1, 0.5)])
    with pytest.raises(RuntimeError, match="in the middle"):
        quiet_trainer([calibrate(), pruning]).fit(module, train_dataloaders=loader_of(token_batches()))
    assert not module._load_state_dict_pre_hooks
    assert sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules()) == 0


def test_our_module_without_recovery_is_refused_before_the_first_batch(tmp_path):
    from lightning_moe.training.module import RecoveryModule

    module = RecoveryModule(source=save_model(tmp_path / "model"), gradient_checkpointing=False)
    module.configure_model()
    module.requires_grad_(requires_grad=False)
    with pytest.raises(ValueError, match=r"Nothing is trainable: put `callbacks.Recovery`"):
        quiet_trainer().fit(module, datamodule=text_module(save_text(tmp_path), validation=None))


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`")
def test_statistics_of_other_corpora(tmp_path):
    file = tmp_path / "s.safetensors"
    statistics_of(tiny_model()).save(file)  # of the corpus `train`
    data = text_module(save_text(tmp_path))  # calibrates on `a`
    with pytest.raises(ValueError, match=r"are of the corpora \['train'\], and `data.calibration` names \['a'\]"):
        quiet_trainer([ExpertCalibration(file=str(file))]).fit(ForeignModule(), datamodule=data)
