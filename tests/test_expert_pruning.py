"""ExpertPruning: whole experts leave, at once or on a schedule, alone or mixed with channel cuts."""

import logging

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_models import tiny_model
from tiny_runs import ForeignModule, loader_of, quiet_trainer, token_batches

from callbacks import ChannelPruning, ExpertCalibration, ExpertPruning
from lightning_moe.allocation import build_method
from lightning_moe.allocation.expert_dropping import drop_experts
from lightning_moe.calibration.collector import collect_statistics
from lightning_moe.models.discovery import model_shape, moe_layers
from lightning_moe.records import ExpertScores, LayerShape, ModelShape
from lightning_moe.training.checkpoint import noted_structure

pytestmark = pytest.mark.schedule


def fit(trainer_callbacks, *, module=None, ckpt_path=None, **settings):
    module = ForeignModule() if module is None else module
    trainer = quiet_trainer(trainer_callbacks, **({"max_steps": 6} | settings))
    trainer.fit(module, train_dataloaders=loader_of(token_batches(1)), ckpt_path=ckpt_path)
    return module, trainer


def calibrate(**settings):
    return ExpertCalibration(**settings or {"num_batches": 1})


def widths_of(module):
    return [layer.base_experts.widths for layer in moe_layers(module.lm)]


def num_channels(module):
    return model_shape(module.lm).num_channels


def test_at_once_it_is_the_plan_of_reap():
    model = tiny_model().train()
    statistics = collect_statistics(model, loaders={"train": token_batches(1)}, progress=False)
    expected = build_method("reap").plan(statistics, prune_ratio=0.25)
    pruning = ExpertPruning(keep_ratio=0.75)
    module, trainer = fit([calibrate(), pruning], max_steps=1)
    assert pruning.plans[0].digest == expected.digest
    assert pruning.requested_ratio == 0.25
    assert [len(widths) for widths in widths_of(module)] == [6, 6]
    assert {id(p) for g in trainer.optimizers[0].param_groups for p in g["params"]} == set(map(id, module.parameters()))


@pytest.mark.parametrize("settings", [{"prune_ratio": 0.3}, {"schedule": [(1, 0.3)]}])
def test_a_ratio_is_met_to_the_nearest_whole_expert(settings, caplog):
    """0.3 of 8 experts are 2.4: 2 leave each layer."""
    with caplog.at_level(logging.INFO):
        module, _ = fit([calibrate(), ExpertPruning(**settings)], max_steps=2)
    assert [len(widths) for widths in widths_of(module)] == [6, 6]
    assert "met to the nearest whole expert of each layer" in caplog.text


def test_on_a_schedule_routers_and_their_moments_shrink():
    pruning = ExpertPruning(schedule=[(2, 0.25), (4, 0.5)])
    module, trainer = fit([calibrate(window=2), pruning])
    assert [plan.num_kept for plan in pruning.plans] == [384, 256]
    assert [len(plan.evicted(0)) for plan in pruning.plans] == [2, 2]
    assert widths_of(module) == [(32,) * 4] * 2
    (optimizer,) = trainer.optimizers
    for layer in moe_layers(module.lm):
        assert layer.router.num_experts == 4
        assert layer.router.weight.shape == optimizer.state[layer.router.weight]["exp_avg"].shape == (4, 64)
        assert layer.router.top_k == 2
    assert {int(state["step"]) for state in optimizer.state.values()} == {6}


@pytest.mark.parametrize("name", ["deepseek_v3_grouped", "deepseek_v2_grouped"])
def test_grouped_routers_are_masked(name):
    pruning = ExpertPruning(schedule=[(1, 0.25)])
    groups = {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
    module, _ = fit([calibrate(), pruning], module=ForeignModule(model=tiny_model(name, **groups)), max_steps=3)
    assert len(pruning.plans[0].evicted(0)) == 2
    assert [widths.count(0) for widths in widths_of(module)] == [2, 2]
    assert moe_layers(module.lm)[0].router.weight.shape[0] == 8
    assert len(module.losses) == 3


@pytest.mark.parametrize("first", ["experts", "channels"])
def test_mixed_schedules_count_from_the_unpruned_model(first):
    """Channels to 25 % at step 1 and 62.5 % at step 3, experts to 50 % at step 2: whoever removed them, in any order.

    512 channels: 384, then about 256 (whole experts of unequal width), then 192.
    """
    experts = ExpertPruning(schedule=[(2, 0.5)])
    channels = ChannelPruning(schedule=[(1, 0.25), (3, 0.625)], method_args={"align": 8})
    both = [experts, channels] if first == "experts" else [channels, experts]
    module, trainer = fit([calibrate(window=1), *both], max_steps=5)
    assert [plan.num_kept for plan in channels.plans] == [384, 192]
    assert experts.plans[0].num_kept == pytest.approx(256, abs=32)  # half an expert in each of two layers
    assert num_channels(module) == 192
    in_optimizer = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert in_optimizer == set(map(id, module.parameters()))


def test_experts_of_unequal_width_are_dropped_by_their_channels():
    """Widths 32, 8, 8, 8, 8 by falling score; half of 64 are the first alone, where half of five would be two."""
    shape = LayerShape(name="layer", widths=(8, 8, 32, 8, 8), top_k=1)
    model = ModelShape(model_type="t", hidden_size=64, layers=(shape,), router_digest="")
    score_E = torch.tensor([4.0, 3, 5, 2, 1], dtype=torch.float64)
    (keep_C,) = drop_experts(ExpertScores(shape=model, scores=(score_E,), criterion="reap"), prune_ratio=0.5)
    assert [int(part.sum()) for part in keep_C.split(shape.widths)] == [0, 0, 32, 0, 0]
    (keep_C,) = drop_experts(ExpertScores(shape=model, scores=(score_E,), criterion="reap"), prune_ratio=0.3)
    assert [int(part.sum()) for part in keep_C.split(shape.widths)] == [
        8,
        8,
        32,
        0,
        0,
    ]  # of 40 and 48 the latter is nearer to 44.8


def test_both_at_the_same_step():
    experts = ExpertPruning(schedule=[(1, 0.25)])
    channels = ChannelPruning(schedule=[(1, 0.5)], method_args={"align": 8})
    fit([calibrate(), experts, channels], max_steps=3)
    assert experts.plans[0].num_kept == channels.plans[0].shape.num_channels == 384
    assert channels.plans[0].num_kept == 256


def test_both_at_once_before_training():
    """The second one calibrates the model that the first one left."""
    experts, channels = ExpertPruning(prune_ratio=0.25), ChannelPruning(prune_ratio=0.5, method_args={"align": 8})
    module, _ = fit([calibrate(), experts, channels], max_steps=1)
    assert channels.plans[0].shape.num_channels == 384
    assert num_channels(module) == 256


def test_a_ratio_that_is_reached_already_cuts_nothing():
    experts, channels = ExpertPruning(schedule=[(2, 0.25)]), ChannelPruning(schedule=[(1, 0.5)], method="uniform")
    module, _ = fit([calibrate(), channels, experts], max_steps=3)
    assert experts.plans == []
    assert num_channels(module) == 256
    assert experts.requested_ratio == 0.25


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_resumed_run_ends_with_the_same_weights(tmp_path, stop):
    def run(max_steps, *, ckpt_path=None):
        checkpoint = ModelCheckpoint(dirpath=tmp_path / str(max_steps), save_last=True)
        mixed = [ExpertPruning(schedule=[(2, 0.25)]), ChannelPruning(schedule=[(4, 0.5)], method_args={"align": 8})]
        return fit(
            [calibrate(window=2), *mixed, checkpoint],
            max_steps=max_steps,
            max_epochs=-1,
            enable_checkpointing=True,
            deterministic=True,
            ckpt_path=ckpt_path,
        )[0]

    whole = run(6)
    run(stop)
    saved = torch.load(tmp_path / str(stop) / "last.ckpt", weights_only=True)
    assert noted_structure(saved) is not None  # in somebody else's module
    resumed = run(6, ckpt_path=tmp_path / str(stop) / "last.ckpt")
    expected = whole.state_dict()
    assert expected.keys() == resumed.state_dict().keys()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.state_dict().items())


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_cut_before_training_is_not_made_again_on_resume(tmp_path, monkeypatch):
    def run(max_steps, ratio=0.25, **settings):
        checkpoint = ModelCheckpoint(dirpath=tmp_path / str(max_steps), save_last=True)
        pruning = ExpertPruning(prune_ratio=ratio)
        settings |= {"max_epochs": -1, "enable_checkpointing": True, "deterministic": True, "max_steps": max_steps}
        return fit([calibrate(), pruning, checkpoint], **settings)[0], pruning

    whole, first = run(4)
    run(2)
    last = tmp_path / "2" / "last.ckpt"

    def never(*args, **settings):
        raise AssertionError("a resumed run calibrated again")

    monkeypatch.setattr("callbacks.calibration.collect_statistics", never)
    resumed, second = run(4, ckpt_path=last)
    assert [plan.digest for plan in second.plans] == [plan.digest for plan in first.plans]
    expected = whole.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.state_dict().items())
    with pytest.raises(ValueError, match=r"made with \[.ExpertPruning.*0.25.*, and this run has ExpertPruning.*0.5"):
        run(4, ratio=0.5, ckpt_path=last)
