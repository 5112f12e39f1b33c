"""States through real checkpoints, two of a kind at once, and nothing left behind: after fit and after exceptions."""

import json

import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from manners import IN_TRAINING, NUM_CHANNELS, VARIANTS, Everyone, hooks_in, num_channels
from random_plans import uniform_plan
from tiny_models import tiny_model
from tiny_runs import loader_of, quiet_trainer, save_model, save_text, text_module, token_batches

from callbacks import (
    ChannelPruning,
    CompressionReport,
    ExpertCalibration,
    ExpertPruning,
    ExportPruned,
    Recovery,
    RouterMonitor,
)
from lightning_moe.models.discovery import moe_layers
from lightning_moe.training.module import RecoveryModule

SETTINGS = {"limit_val_batches": 1, "num_sanity_val_steps": 1, "enable_checkpointing": True, "max_epochs": -1}


def fit(callbacks, folder, *, max_steps, ckpt_path=None):
    """Epochs of one batch: a plain loader cannot go on within one."""
    module, checkpoint = Everyone(), ModelCheckpoint(dirpath=folder, save_last=True, save_top_k=0)
    trainer = quiet_trainer([*callbacks, checkpoint], **(SETTINGS | {"max_steps": max_steps}))
    batches = loader_of(token_batches(1))
    trainer.fit(module, train_dataloaders=batches, val_dataloaders=batches, ckpt_path=ckpt_path)
    return module


@pytest.mark.parametrize("name", VARIANTS)
def test_states_survive_a_checkpoint(name, tmp_path):
    stopped = VARIANTS[name]()
    fit(stopped, tmp_path, max_steps=2)
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    fresh = VARIANTS[name]()
    resumed = fit(fresh, tmp_path, max_steps=2, ckpt_path=tmp_path / "last.ckpt")
    for before, after in zip(stopped, fresh, strict=True):
        assert before.state_key == after.state_key
        state = before.state_dict()
        assert stored.get(before.state_key, {}) == state == after.state_dict()
    assert [plan.digest for plan in stopped[1].plans] == [plan.digest for plan in fresh[1].plans]
    # Two steps: of a schedule only the cut at step 1 was made.
    assert num_channels(resumed.lm) == (384 if name in IN_TRAINING else NUM_CHANNELS // 2)


def one_more_of_each(folder):
    """Two instances of everything, with settings that differ."""
    return [
        ExpertCalibration(num_batches=1),
        ExpertCalibration(num_batches=2, window=1),
        ChannelPruning(prune_ratio=0.25),
        ChannelPruning(schedule=[(1, 0.5)]),
        ExpertPruning(schedule=[(2, 0.625)]),
        RouterMonitor(every_n_steps=1, folder=str(folder / "first")),
        RouterMonitor(every_n_steps=2, folder=str(folder / "second")),
    ]


def test_two_of_a_kind(tmp_path):
    callbacks = one_more_of_each(tmp_path)
    keys = [callback.state_key for callback in callbacks]
    assert len(set(keys)) == len(keys)
    module = fit(callbacks, tmp_path, max_steps=3)
    assert num_channels(module.lm) < NUM_CHANNELS // 2
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    assert set(keys) <= set(stored) | {keys[0]}  # the first one has no state
    tables = [json.loads((tmp_path / name / "router.json").read_text(encoding="utf-8")) for name in ("first", "second")]
    assert tables[0] == tables[1]
    assert hooks_in(module) == 0


def test_two_exports_and_reports(tmp_path):
    """Each report is of the first export before it in the list."""
    save_text(tmp_path)
    folders = [tmp_path / name for name in ("first", "second")]
    callbacks = [ExpertCalibration(), ChannelPruning(prune_ratio=0.25, repair=False), Recovery()]
    callbacks += [ExportPruned(folder=str(folder / "export"), formats=["merged_nf4"]) for folder in folders]
    callbacks += [CompressionReport(folder=str(folder), name="run") for folder in folders]
    module = RecoveryModule(source=save_model(tmp_path / "model"))
    quiet_trainer(callbacks, max_steps=1).fit(module, datamodule=text_module(tmp_path))
    assert all((folder / "export" / "merged_nf4" / "config.json").exists() for folder in folders)
    rows = [json.loads((folder / "stages" / "run_merged.json").read_text(encoding="utf-8")) for folder in folders]
    assert rows[0]["nll"] == pytest.approx(rows[1]["nll"])


class BrokenError(RuntimeError):
    """What the tests raise."""


class FailsAtStep(Callback):
    """Raises within the training step, between forward and backward, at one step."""

    def __init__(self, step):
        self.step = step

    def on_before_backward(self, trainer, pl_module, loss):
        if trainer.global_step == self.step:
            raise BrokenError("here")


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("step", [0, 1])
def test_nothing_is_left_after_an_exception_in_the_training_step(name, step):
    module, batches = Everyone(), loader_of(token_batches(3))
    trainer = quiet_trainer([*VARIANTS[name](), FailsAtStep(step)])
    with pytest.raises(BrokenError, match="here"):
        trainer.fit(module, batches)
    assert hooks_in(module) == 0


@pytest.mark.parametrize("name", VARIANTS)
def test_nothing_is_left_after_an_exception_in_validation(name):
    class Failing(Everyone):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            raise BrokenError("here")

    module, batches = Failing(), loader_of(token_batches(3))
    with pytest.raises(BrokenError, match="here"):
        quiet_trainer(VARIANTS[name](), limit_val_batches=1).fit(module, batches, batches)
    assert hooks_in(module) == 0


@pytest.mark.parametrize("name", ["one_shot", "scheduled", "experts", "scheduled_recovery"])
def test_nothing_is_left_after_an_exception_in_calibration(name, monkeypatch):
    module, batches = Everyone(), loader_of(token_batches(3))
    decoder = moe_layers(module.lm)[1].decoder_layer
    original, calls = decoder.forward, []

    def failing(*args, **kwargs):
        calls.append(module.lm.training)
        if not module.lm.training:
            raise BrokenError("here")
        return original(*args, **kwargs)

    monkeypatch.setattr(decoder, "forward", failing)
    with pytest.raises(BrokenError, match="here"):
        quiet_trainer(VARIANTS[name](), max_steps=3).fit(module, batches)
    assert not calls[-1]
    monkeypatch.undo()
    assert hooks_in(module) == 0
    assert module.lm.training
    assert all(p.grad is None or p.grad.shape == p.shape for p in module.lm.parameters())


@pytest.mark.parametrize("name", VARIANTS)
def test_nothing_is_left_after_fit(name):
    module = Everyone()
    before = {id(part) for part in module.modules() if part._forward_hooks or part._forward_pre_hooks}
    quiet_trainer(VARIANTS[name](), max_steps=3).fit(module, loader_of(token_batches(3)))
    assert hooks_in(module) == 0
    assert before <= {id(part) for part in module.modules()}


def test_an_interrupted_run_can_be_fitted_again_with_the_same_callbacks():
    """A notebook: the cell failed, was mended and run again; what is cut is not cut again."""
    module, callbacks, batches = Everyone(), VARIANTS["scheduled"](), loader_of(token_batches(4))
    with pytest.raises(BrokenError, match="here"):
        quiet_trainer([*callbacks, FailsAtStep(1)], max_steps=4).fit(module, batches)
    assert num_channels(module.lm) == 384
    quiet_trainer(callbacks, max_steps=4).fit(module, batches)
    assert num_channels(module.lm) == 256


def check_plain(value):
    if isinstance(value, dict | list | tuple):
        for inner in [*value, *value.values()] if isinstance(value, dict) else value:
            check_plain(inner)
    else:
        assert value is None or type(value) in (bool, int, float, str, torch.Tensor)


def test_states_hold_plain_types_only(tmp_path):
    callbacks = one_more_of_each(tmp_path)
    fit(callbacks, tmp_path, max_steps=3)
    for callback in callbacks:
        check_plain(callback.state_dict())


def test_a_plan_from_a_file_has_a_state_too(tmp_path):
    uniform_plan(tiny_model(), width=16).save(tmp_path / "plan.safetensors")

    def callbacks():
        return [ChannelPruning(plan_file=str(tmp_path / "plan.safetensors"), repair=False)]

    first = callbacks()
    fit(first, tmp_path, max_steps=1)
    second = callbacks()
    module = fit(second, tmp_path, max_steps=2, ckpt_path=tmp_path / "last.ckpt")
    assert second[0].state_dict() == first[0].state_dict()
    assert num_channels(module.lm) == NUM_CHANNELS // 2
