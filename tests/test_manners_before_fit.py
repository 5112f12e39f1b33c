"""Validation before training: which cut it sees, that nothing is calibrated for a checkpoint, and that fit works."""

import logging

import pytest
from manners import IN_TRAINING, NUM_CHANNELS, VARIANTS, Everyone, is_consistent
from tiny_models import tiny_model
from tiny_runs import SHIPPED_VOCABULARY, loader_of, quiet_trainer, save_text, text_module, token_batches

import callbacks.calibration
from callbacks import ChannelPruning, ExpertCalibration, ExpertPruning, Recovery
from callbacks._pruning import prunings
from lightning_moe.adapters.storage import adapter_settings
from lightning_moe.calibration.collector import collect_statistics
from lightning_moe.models.discovery import model_shape

HALF = NUM_CHANNELS // 2


def channels(module):
    return model_shape(module.lm).num_channels


def batches():
    return loader_of(token_batches(6))


def one_shot(**settings):
    return ChannelPruning(**({"prune_ratio": 0.5, "method_args": {"align": 8}} | settings))


def saved(make, folder):
    """A checkpoint after the cuts of three steps."""
    trainer = quiet_trainer(make(), max_steps=3)
    trainer.fit(Everyone(), batches())
    trainer.save_checkpoint(folder / "3.ckpt")
    return folder / "3.ckpt"


def test_a_cut_that_waits_for_fit_is_said(caplog):
    module, trainer = Everyone(), quiet_trainer(VARIANTS["recovered"](), limit_val_batches=1)
    with caplog.at_level(logging.WARNING):
        trainer.validate(module, dataloaders=batches(), verbose=False)
    assert "This loop runs on the model without the cut of ChannelPruning, which `fit` makes" in caplog.text
    assert channels(module) == NUM_CHANNELS
    assert adapter_settings(module.lm) is None
    trainer.fit(module, batches())
    assert channels(module) == HALF
    is_consistent(module, trainer)


def test_a_window_is_filled_in_fit():
    module = Everyone()
    pruning = ChannelPruning(schedule=[(2, 0.5)])
    trainer = quiet_trainer([ExpertCalibration(window=1), pruning], max_steps=3, limit_val_batches=1)
    trainer.validate(module, dataloaders=batches(), verbose=False)
    trainer.fit(module, batches())
    assert len(pruning.plans) == 1
    assert channels(module) == HALF


@pytest.mark.parametrize("recovery", [False, True])
def test_corpora_are_there_in_every_loop(tmp_path, recovery):
    """Cut in a loop that makes inference tensors: the parameters are none, and train."""
    module, data = Everyone(model=tiny_model(vocab_size=SHIPPED_VOCABULARY)), text_module(save_text(tmp_path))
    trained = [Recovery()] if recovery else []
    trainer = quiet_trainer([ExpertCalibration(num_batches=1), one_shot(), *trained], limit_val_batches=1)
    trainer.validate(module, datamodule=data, verbose=False)
    assert channels(module) == HALF
    assert not any(p.is_inference() for p in module.lm.parameters())
    trainer.fit(module, datamodule=data)
    assert channels(module) == HALF
    is_consistent(module, trainer)


@pytest.mark.parametrize("make", [lambda: one_shot(repair=False), lambda: ExpertPruning(prune_ratio=0.5)])
def test_statistics_of_a_file_are_enough_without_a_repair(tmp_path, make):
    module, file = Everyone(), tmp_path / "s.safetensors"
    collect_statistics(module.lm, loaders={"train": token_batches(2)}, progress=False).save(file)
    trainer = quiet_trainer([ExpertCalibration(file=str(file), num_batches=1), make()], limit_val_batches=1)
    trainer.validate(module, dataloaders=batches(), verbose=False)
    assert channels(module) == HALF
    trainer.fit(module, batches())
    assert channels(module) == HALF


@pytest.mark.parametrize("name", VARIANTS)
def test_a_checkpoint_is_validated_as_it_was_cut(tmp_path, monkeypatch, name):
    """Nothing is calibrated; a fit afterwards trains on from there and cuts nothing again."""
    path, calls = saved(VARIANTS[name], tmp_path), []

    def counted(model, **settings):
        calls.append(model)
        return collect_statistics(model, **settings)

    monkeypatch.setattr(callbacks.calibration, "collect_statistics", counted)
    module = Everyone()
    trainer = quiet_trainer(VARIANTS[name](), max_steps=3, limit_val_batches=1)
    trainer.validate(module, dataloaders=batches(), ckpt_path=path, verbose=False)
    assert channels(module) == HALF
    trainer.fit(module, batches())
    assert channels(module) == HALF
    assert calls == []
    is_consistent(module, trainer)


@pytest.mark.parametrize(
    ("name", "validated"),
    [(name, True) for name in VARIANTS] + [(name, False) for name in VARIANTS if name != "scheduled_recovery"],
)
def test_a_run_goes_on_after_validate(tmp_path, name, validated):
    """`fit(ckpt_path=...)` after validating the checkpoint, or the model as it was made."""
    path, module = saved(VARIANTS[name], tmp_path), Everyone()
    trainer = quiet_trainer(VARIANTS[name](), max_steps=5, limit_val_batches=1)
    trainer.validate(module, dataloaders=batches(), ckpt_path=path if validated else None, verbose=False)
    assert channels(module) == (HALF if validated else NUM_CHANNELS)
    trainer.fit(module, batches(), ckpt_path=path)
    assert (channels(module), trainer.global_step) == (HALF, 5)
    is_consistent(module, trainer)
    assert [len(pruning.plans) for pruning in prunings(trainer)] == [2 if name in IN_TRAINING else 1]


def test_adapters_put_in_by_validate_stand_in_the_way_of_a_checkpoint(tmp_path):
    make = VARIANTS["scheduled_recovery"]
    path, module, trainer = saved(make, tmp_path), Everyone(), quiet_trainer(make(), max_steps=5, limit_val_batches=1)
    trainer.validate(module, dataloaders=batches(), verbose=False)
    with pytest.raises(ValueError, match=r"has adapters already, and 256 channels, not .*a module that was just made"):
        trainer.fit(module, batches(), ckpt_path=path)


@pytest.mark.parametrize(
    ("made", "asked"),
    [
        ({"num_batches": 1}, {"num_batches": 2}),
        ({"num_batches": 1}, {"window": 1}),
        ({"window": 1}, {"window": 2}),
        ({"window": 1, "num_batches": 1}, {"window": 1}),
    ],
)
def test_cuts_go_on_with_the_calibration_they_began_with(tmp_path, made, asked):
    def make(settings):
        return [ExpertCalibration(**settings), ChannelPruning(schedule=[(1, 0.25), (2, 0.5)])]

    path = saved(lambda: make(made), tmp_path)
    with pytest.raises(ValueError, match=r"made with \[\"ExpertCalibration\{.*and this run has ExpertCalibration\{"):
        quiet_trainer(make(asked), max_steps=5).fit(Everyone(), batches(), ckpt_path=path)


def test_one_cut_goes_on_with_any_calibration(tmp_path):
    """It is behind, and nothing is calibrated again."""
    path = saved(lambda: [ExpertCalibration(num_batches=1), one_shot()], tmp_path)
    module = Everyone()
    trainer = quiet_trainer([ExpertCalibration(num_batches=2), one_shot()], max_steps=4)
    trainer.fit(module, batches(), ckpt_path=path)
    assert (channels(module), trainer.global_step) == (HALF, 4)


@pytest.mark.parametrize("pruning", [one_shot, lambda: ChannelPruning(schedule=[(1, 0.5)])])
@pytest.mark.parametrize("loop", ["validate", "test", "predict"])
def test_weights_alone_do_not_say_what_the_model_looks_like(tmp_path, pruning, loop):
    def make():
        return [ExpertCalibration(num_batches=1), pruning()]

    trainer = quiet_trainer(make(), limit_val_batches=1)
    trainer.fit(Everyone(), batches())
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    with pytest.raises(ValueError, match=r"neither the state of ChannelPruning nor the structure.*`write_structure\("):
        getattr(quiet_trainer(make(), limit_val_batches=1), loop)(
            Everyone(), batches(), ckpt_path=tmp_path / "weights.ckpt"
        )


def test_a_dense_run_gets_no_schedule_later(tmp_path):
    path = saved(list, tmp_path)
    pruning = [ExpertCalibration(num_batches=1), ChannelPruning(schedule=[(4, 0.5)])]
    with pytest.raises(ValueError, match=r"was made with no ChannelPruning, and this run has ChannelPruning\{"):
        quiet_trainer(pruning, max_steps=5).fit(Everyone(), batches(), ckpt_path=path)
