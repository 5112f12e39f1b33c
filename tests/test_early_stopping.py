"""Stopping early on held-out loss, and going back to the best weights."""

import logging
from types import SimpleNamespace

import pytest
import torch
import yaml
from cli_runs import CONFIGS, quickstart, save_job
from lightning import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from tiny_runs import quiet_trainer, save_model, save_text, text_module

from callbacks import ChannelPruning, ExpertCalibration, Recovery
from lightning_moe.adapters.inject import AdapterConfig
from lightning_moe.evaluation.perplexity import evaluate_model
from lightning_moe.evaluation.stages import load_stages
from lightning_moe.training.best_checkpoint import check_best
from lightning_moe.training.module import LanguageModelModule, RecoveryModule


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = save_text(tmp_path_factory.mktemp("stopping"))
    save_model(folder / "model")
    return folder


class Watch(Callback):
    """Held-out loss at every validation, by step."""

    def __init__(self):
        self.nll = {}

    def on_validation_end(self, trainer, pl_module):
        self.nll[trainer.global_step] = trainer.callback_metrics["nll"].item()


class Unlearns(RecoveryModule):
    """Learns for three steps, and unlearns from then on."""

    def objective(self, logits_BSV, batch):
        loss = super().objective(logits_BSV, batch)
        return loss if self.global_step < 3 else -loss


def fit(folder, tmp_path, *, patience=2, max_steps=12, **settings):
    rates = {"expert_learning_rate": 0.03, "router_learning_rate": 0.03, "schedule": "constant_with_warmup"}
    module = Unlearns(source=str(folder / "model"), gradient_checkpointing=False, betas=(0.0, 0.9), **rates, **settings)
    torch.manual_seed(0)
    watch = Watch()
    callbacks = [
        watch,
        Recovery(quantize="none", adapter=AdapterConfig(expert_rank=2, router_rank=2)),
        EarlyStopping(monitor="nll", patience=patience, min_delta=0.001, check_on_train_epoch_end=False),
        ModelCheckpoint(dirpath=tmp_path, filename="best", monitor="nll", enable_version_counter=False),
    ]
    trainer = quiet_trainer(
        callbacks,
        max_steps=max_steps,
        enable_checkpointing=True,
        limit_val_batches=1.0,
        num_sanity_val_steps=0,
        val_check_interval=1,
        check_val_every_n_epoch=None,
    )
    trainer.fit(module, datamodule=text_module(folder))
    return module, watch.nll, trainer


def best_of(nll):
    return min(nll, key=lambda step: nll[step])


def test_training_stops_when_the_held_out_loss_no_longer_falls(folder, tmp_path):
    _, nll, trainer = fit(folder, tmp_path, patience=2)
    assert trainer.global_step == best_of(nll) + 2 < 12


@pytest.mark.parametrize("restore", [False, True])
def test_the_best_weights_come_back_where_asked_for(folder, tmp_path, restore):
    module, nll, trainer = fit(folder, tmp_path, restore_best=restore)
    checkpoint = torch.load(tmp_path / "best.ckpt", weights_only=True)
    assert checkpoint["global_step"] == best_of(nll) < trainer.global_step
    data = text_module(folder)
    loaders = dict(zip("ab", data.val_dataloader(), strict=True))
    found = evaluate_model(module.language_model, loaders=loaders, progress=False).nll
    assert found == pytest.approx(nll[best_of(nll)] if restore else nll[trainer.global_step], rel=1e-5)


def test_the_whole_model_stops_early_too(folder, tmp_path):
    module = LanguageModelModule(source=str(folder / "model"), learning_rate=0.1, schedule="constant_with_warmup")
    watch = Watch()
    stop = EarlyStopping(monitor="nll", patience=1, check_on_train_epoch_end=False)
    settings = {"limit_val_batches": 1.0, "num_sanity_val_steps": 0, "val_check_interval": 1}
    trainer = quiet_trainer([watch, stop], max_steps=12, check_val_every_n_epoch=None, **settings)
    trainer.fit(module, datamodule=text_module(folder))
    assert trainer.global_step == best_of(watch.nll) + 1 < 12


def test_the_config_stops_and_exports_the_best(tmp_path):
    job = save_job(tmp_path)
    overlay = yaml.safe_load((CONFIGS / "early_stopping.yaml").read_text())
    overlay["trainer"] |= {"val_check_interval": 1, "max_steps": 12, "default_root_dir": str(job / "stopping")}
    assert overlay["trainer"]["callbacks"][0]["init_args"]["patience"] == 2
    overlay["trainer"]["callbacks"][0]["init_args"]["min_delta"] = 100.0  # nothing after the first validation counts
    (job / "stopping.yaml").write_text(yaml.safe_dump(overlay))
    quickstart(job, "--config", job / "stopping.yaml")
    checkpoint = torch.load(job / "stopping" / "checkpoints" / "best.ckpt", weights_only=True)
    kept = next(state for name, state in checkpoint["callbacks"].items() if name.startswith("ModelCheckpoint"))
    row = load_stages(job / "fit")["recovered_50_nf4"]
    assert row["steps"] == 3
    assert row["nll"] == pytest.approx(float(kept["best_model_score"]), abs=0.01)


class Rising(Callback):
    """A metric that is lowest at the first validation, before the cut, and highest at the last."""

    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("step", float(trainer.global_step))


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
@pytest.mark.parametrize(("mode", "fits"), [("min", False), ("max", True)])
def test_weights_from_before_a_cut_do_not_come_back(folder, tmp_path, caplog, mode, fits):
    cut = ChannelPruning(schedule=[(1, 0.25)], method_args={"align": 8})
    keep = ModelCheckpoint(dirpath=tmp_path, monitor="step", mode=mode, save_on_train_epoch_end=False)
    settings = {"limit_val_batches": 1.0, "val_check_interval": 1, "num_sanity_val_steps": 0, "max_steps": 3}
    trainer = quiet_trainer(
        [ExpertCalibration(), cut, small_recovery(), Rising(), keep], enable_checkpointing=True, **settings
    )
    module = best_module(folder)
    with caplog.at_level(logging.INFO):
        trainer.fit(module, datamodule=text_module(folder))
    stored = torch.load(keep.best_model_path, weights_only=True)["state_dict"]
    assert ("was written before the model was cut further" in caplog.text) is not fits
    mine = module.state_dict()
    assert all(mine[name].equal(value) for name, value in stored.items()) is fits


def best_module(folder):
    return RecoveryModule(source=str(folder / "model"), restore_best=True, gradient_checkpointing=False)


def small_recovery():
    return Recovery(quantize="none", adapter=AdapterConfig(expert_rank=2, router_rank=2))


def test_the_best_weights_need_a_checkpoint_of_a_metric(folder):
    with pytest.raises(ValueError, match=r"`restore_best` needs a ModelCheckpoint with a `monitor`, such as `nll`"):
        quiet_trainer([small_recovery()]).fit(best_module(folder), datamodule=text_module(folder))


def test_the_best_weights_need_validation(folder, tmp_path):
    keep = ModelCheckpoint(dirpath=tmp_path, monitor="nll")
    trainer = quiet_trainer([small_recovery(), keep], enable_checkpointing=True)
    with pytest.raises(ValueError, match=r"`restore_best` needs validation .* `trainer.limit_val_batches`, now 0"):
        trainer.fit(best_module(folder), datamodule=text_module(folder))


def test_sharded_weights_do_not_come_back(tmp_path):
    keep = ModelCheckpoint(dirpath=tmp_path, monitor="nll")
    trainer = SimpleNamespace(checkpoint_callbacks=[keep], enable_validation=True, strategy=ModelParallelStrategy())
    with pytest.raises(ValueError, match=r"`restore_best` loads whole weights, and ModelParallelStrategy shards them"):
        check_best(trainer)


def test_a_run_that_ends_before_its_first_validation_keeps_its_last_weights(folder, tmp_path, caplog):
    keep = ModelCheckpoint(dirpath=tmp_path, monitor="nll", every_n_train_steps=0)
    settings = {"limit_val_batches": 1.0, "num_sanity_val_steps": 0, "val_check_interval": 50}
    trainer = quiet_trainer(
        [small_recovery(), keep], enable_checkpointing=True, **settings, check_val_every_n_epoch=None
    )
    with caplog.at_level(logging.WARNING):
        trainer.fit(best_module(folder), datamodule=text_module(folder))
    assert "No best checkpoint was saved before training ended: the last weights stay" in caplog.text
    assert trainer.global_step == 2


def test_fast_dev_run_saves_no_checkpoint_and_ends_well(folder, tmp_path):
    keep = ModelCheckpoint(dirpath=tmp_path, monitor="nll")
    trainer = quiet_trainer([small_recovery(), keep], enable_checkpointing=True, fast_dev_run=True)
    trainer.fit(best_module(folder), datamodule=text_module(folder))
    assert not list(tmp_path.iterdir())
