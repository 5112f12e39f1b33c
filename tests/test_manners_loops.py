"""Other loops than fit on a pruned module, checkpoints over a cut, early stopping, averaging, loggers."""

import csv

import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from manners import IN_TRAINING, NUM_CHANNELS, VARIANTS, Everyone, hooks_in, is_consistent, num_channels
from tiny_runs import loader_of, quiet_trainer, save_model, save_text, text_module, token_batches

from callbacks import ChannelPruning, ExpertCalibration, Recovery
from lightning_moe.models.discovery import model_shape
from lightning_moe.training.module import LanguageModelModule

HALF = NUM_CHANNELS // 2


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("loop", ["validate", "test", "predict"])
@pytest.mark.parametrize("name", VARIANTS)
def test_other_loops_before_and_after_fit(name, loop):
    module, callbacks, batches = Everyone(), VARIANTS[name](), loader_of(token_batches(4))
    trainer = quiet_trainer(callbacks, max_steps=3, limit_val_batches=1)
    getattr(trainer, loop)(module, dataloaders=batches)
    assert model_shape(module.lm).num_channels == NUM_CHANNELS  # `fit` cuts: there are training batches
    assert not any(p.is_inference() for p in module.lm.parameters())
    trainer.fit(module, batches)
    is_consistent(module, trainer)
    after = weights(module)
    getattr(trainer, loop)(module, dataloaders=batches)
    assert num_channels(module.lm) == HALF
    assert all(torch.equal(value, after[key]) for key, value in module.state_dict().items())
    assert hooks_in(module) == 0


@pytest.mark.parametrize("name", VARIANTS)
def test_fit_again_after_validate_trains_on(name):
    module, callbacks, batches = Everyone(), VARIANTS[name](), loader_of(token_batches(4))
    quiet_trainer(callbacks, max_steps=3).fit(module, batches)
    first = weights(module)
    trainer = quiet_trainer(callbacks, max_steps=2, limit_val_batches=1)
    trainer.validate(module, dataloaders=batches, verbose=False)
    trainer.fit(module, batches)
    is_consistent(module, trainer)
    moved = [key for key, p in module.named_parameters() if p.requires_grad and not torch.equal(p, first[key])]
    assert moved


class Scores(Everyone):
    """A validation score that is best at the first validation, right before the cut at step 2."""

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.log("score", float(self.trainer.global_step))


def cut_after_the_best():
    return [ExpertCalibration(num_batches=1), ChannelPruning(schedule=[(2, 0.5)])]


def cut_adapted_after_the_best():
    return [*cut_after_the_best(), Recovery()]


@pytest.mark.parametrize("make", [cut_after_the_best, cut_adapted_after_the_best])
def test_the_best_checkpoint_may_be_older_than_a_cut(make, tmp_path):
    """It is of the unpruned model; `ckpt_path="best"` in the trainer that has cut since, and in a new one."""
    batches = loader_of(token_batches(6))
    best = ModelCheckpoint(dirpath=tmp_path, save_top_k=2, monitor="score", filename="{step}")
    module, callbacks = Scores(), make()
    settings = {
        "limit_val_batches": 1,
        "val_check_interval": 2,
        "enable_checkpointing": True,
        "num_sanity_val_steps": 0,
    }
    trainer = quiet_trainer([*callbacks, best], max_steps=6, **settings)
    trainer.fit(module, batches, batches)
    assert num_channels(module.lm) == HALF
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step=2.ckpt", "step=4.ckpt"]
    with pytest.raises(ValueError, match=r"The model has another cut than the checkpoint: .* has lost \d+ channels"):
        trainer.validate(module, dataloaders=batches, ckpt_path="best", verbose=False)
    fresh, callbacks = Scores(), make()
    keeper = ModelCheckpoint(dirpath=tmp_path, save_top_k=2, monitor="score")
    (scores,) = quiet_trainer([*callbacks, keeper], limit_val_batches=1, enable_checkpointing=True).validate(
        fresh, dataloaders=batches, ckpt_path=best.best_model_path, verbose=False
    )
    assert num_channels(fresh.lm) == NUM_CHANNELS
    assert scores["val_loss"] > 0


def test_early_stopping_counts_over_a_cut():
    module, batches = Scores(), loader_of(token_batches(8))
    callbacks = [*cut_after_the_best(), EarlyStopping(monitor="score", patience=2)]
    trainer = quiet_trainer(callbacks, max_steps=8, limit_val_batches=1, val_check_interval=2, num_sanity_val_steps=0)
    trainer.fit(module, batches, batches)
    assert trainer.global_step == 6  # best at step 2, then two without improvement
    assert num_channels(module.lm) == HALF


class ByEpoch(Everyone):
    """Stochastic weight averaging wants a schedule by epoch, or none."""

    def configure_optimizers(self):
        return super().configure_optimizers()["optimizer"]


def averaging(kind):
    return kind(swa_lrs=1e-3, swa_epoch_start=1, annealing_epochs=1) if kind is StochasticWeightAveraging else kind()


AVERAGING = pytest.mark.parametrize("kind", [StochasticWeightAveraging, EMAWeightAveraging])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("one_shot", StochasticWeightAveraging),
        ("one_shot", EMAWeightAveraging),
        ("recovered", StochasticWeightAveraging),
    ],
)
def test_weight_averaging_after_a_cut_before_training(name, kind):
    """The average is of the cut model; what is frozen, packed bytes too, stays as it is."""
    frozen = {}

    class Frozen(Callback):
        def on_train_start(self, trainer, pl_module):
            trained = {key for key, p in pl_module.named_parameters() if p.requires_grad}
            frozen.update({key: value for key, value in weights(pl_module).items() if key not in trained})

    module = ByEpoch()
    trainer = quiet_trainer([*VARIANTS[name](), averaging(kind), Frozen()], max_epochs=3, max_steps=-1)
    trainer.fit(module, loader_of(token_batches(2)))
    assert num_channels(module.lm) == HALF
    after = module.state_dict()
    assert all(torch.equal(after[key], value) for key, value in frozen.items())
    assert all(p.isfinite().all() for p in module.lm.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", IN_TRAINING)
@AVERAGING
def test_weight_averaging_does_not_follow_a_cut_in_training(name, kind):
    """Refused before the first batch: their copy of the model would keep the old widths."""
    trainer = quiet_trainer([*VARIANTS[name](), averaging(kind)], max_epochs=3, max_steps=-1)
    with pytest.raises(ValueError, match=rf"{kind.__name__} averages weights of one shape, and `schedule` changes it"):
        trainer.fit(ByEpoch(), loader_of(token_batches(2)))


@pytest.mark.parametrize("name", ["one_shot", "recovered"])
@AVERAGING
def test_weight_averaging_stands_after_what_changes_the_model(name, kind):
    trainer = quiet_trainer([averaging(kind), *VARIANTS[name]()], max_epochs=3, max_steps=-1)
    with pytest.raises(ValueError, match=rf"{kind.__name__} must stand after ChannelPruning in `trainer\.callbacks`"):
        trainer.fit(ByEpoch(), loader_of(token_batches(2)))


def test_codes_of_4_bit_weights_are_no_numbers_to_average():
    trainer = quiet_trainer([*VARIANTS["recovered"](), EMAWeightAveraging()], max_epochs=3, max_steps=-1)
    with pytest.raises(ValueError, match="EMAWeightAveraging would average the codes of 4-bit weights as if they were"):
        trainer.fit(ByEpoch(), loader_of(token_batches(2)))


@pytest.mark.parametrize("name", VARIANTS)
def test_the_csv_logger_writes_on_over_a_cut(name, tmp_path):
    module, batches = Everyone(), loader_of(token_batches(4))
    trainer = quiet_trainer(
        VARIANTS[name](), max_steps=4, limit_val_batches=1, val_check_interval=1, logger=CSVLogger(tmp_path)
    )
    trainer.fit(module, batches, batches)
    (path,) = tmp_path.rglob("metrics.csv")
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len([row for row in rows if row.get("val_loss")]) == 4
    assert len([row for row in rows if row.get("router/entropy")]) == (4 if name == "monitored" else 0)


def test_tensorboard_gets_the_scalars(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = TensorBoardLogger(tmp_path)
    quiet_trainer(VARIANTS["monitored"](), max_steps=3, logger=logger).fit(Everyone(), loader_of(token_batches(3)))
    events = accumulator.EventAccumulator(logger.log_dir)
    events.Reload()
    assert [event.step for event in events.Scalars("router/entropy")] == [1, 2, 3]
    assert events.Scalars("router/max_load")[0].value >= 1


def test_our_module_and_data_under_every_setting(tmp_path):
    """Scheduled cuts of our module with our data: accumulation, clipping, mixed precision, validation by corpus."""
    save_text(tmp_path)
    module = LanguageModelModule(source=save_model(tmp_path / "model"))
    pruning = ChannelPruning(schedule=[(1, 0.25), (2, 0.5)])
    trainer = quiet_trainer(
        [ExpertCalibration(), pruning],
        max_steps=3,
        limit_val_batches=2,
        val_check_interval=2,
        accumulate_grad_batches=2,
        gradient_clip_val=0.5,
        precision="bf16-mixed",
        num_sanity_val_steps=2,
    )
    trainer.fit(module, datamodule=text_module(tmp_path))
    assert num_channels(module.model) == HALF
    assert trainer.callback_metrics["nll"].isfinite()
