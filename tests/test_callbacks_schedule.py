"""Cuts during the training of somebody else's LightningModule: the optimizer follows, and a resumed run too."""

import copy

import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_runs import ForeignModule, loader_of, quiet_trainer, token_batches

from callbacks import ChannelPruning, ExpertCalibration
from lightning_moe.allocation import budget
from lightning_moe.models.discovery import moe_layers
from lightning_moe.surgery.schedule import PruneSchedule

pytestmark = pytest.mark.schedule
SCHEDULE = [(2, 0.25), (4, 0.5)]
NUM_CHANNELS = 2 * 8 * 32


def storage_rows(widths):
    """Row numbers of each expert: ChannelExperts store experts by (width, index)."""
    rows, start = {}, 0
    for expert in sorted(range(len(widths)), key=lambda expert: (widths[expert], expert)):
        rows[expert] = torch.arange(start, start + widths[expert])
        start += widths[expert]
    return rows


def rows_kept(plan, layer_index):
    """By hand: old storage rows in the order of the new storage."""
    before = plan.shape.layers[layer_index].widths
    old, keep = storage_rows(before), plan.keep[layer_index].split(before)
    after = plan.widths(layer_index)
    order = sorted((e for e in range(len(after)) if after[e]), key=lambda expert: (after[expert], expert))
    return torch.cat([old[expert][keep[expert]] for expert in order])


class Spy(Callback):
    """Adam's moments and the learning rates as each batch begins."""

    def __init__(self):
        self.moments, self.widths, self.rates, self.optimizers = [], [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        (optimizer,) = trainer.optimizers
        layers = moe_layers(pl_module.lm)
        self.optimizers.append(optimizer)
        self.rates.append([group["lr"] for group in optimizer.param_groups])
        self.widths.append([layer.experts.widths for layer in layers])
        parameters = [layer.experts.gate_proj.weight for layer in layers]
        self.moments.append([copy.deepcopy(optimizer.state[p]) if p in optimizer.state else None for p in parameters])


class AfterSpy(Spy):
    """The same after the pruning callback."""


@pytest.fixture(scope="module")
def run():
    module, pruning, before, after = (
        ForeignModule(),
        ChannelPruning(schedule=SCHEDULE, method_args={"align": 8}),
        Spy(),
        AfterSpy(),
    )
    trainer = quiet_trainer([before, ExpertCalibration(num_batches=2), pruning, after], max_steps=6)
    trainer.fit(module, train_dataloaders=loader_of(token_batches()))
    return module, trainer, pruning, before, after


def test_every_cut_of_a_schedule_has_the_blocks_of_the_unpruned_model(monkeypatch):
    # Widths here are 32: lower the border so that they count as wide, and the narrower ones after a cut do not.
    monkeypatch.setattr(budget, "_WIDE", 32)
    monkeypatch.setattr(budget, "_WIDE_BLOCK", 8)
    pruning = ChannelPruning(schedule=[(1, 0.5), (2, 0.75)], method="uniform")
    trainer = quiet_trainer([ExpertCalibration(num_batches=1), pruning], max_steps=3)
    trainer.fit(ForeignModule(), train_dataloaders=loader_of(token_batches()))
    assert [(plan.align, plan.widths(0)[0]) for plan in pruning.plans] == [(8, 16), (8, 8)]


def test_widths_follow_the_schedule(run):
    _, _, pruning, before, after = run
    kept = [sum(sum(widths) for widths in step) for step in after.widths]
    assert kept == [512, 512, 384, 384, 256, 256]
    assert before.widths[2] == after.widths[1]
    assert [plan.num_kept for plan in pruning.plans] == [384, 256]
    assert pruning.requested_ratio == 0.5
    assert pruning.plans[1].prune_ratio == pytest.approx(1 - 0.5 / 0.75)


@pytest.mark.parametrize(("step", "plan_index"), [(2, 0), (4, 1)])
def test_moments_of_surviving_rows_are_kept(run, step, plan_index):
    _, _, pruning, before, after = run
    for layer_index in range(2):
        rows = rows_kept(pruning.plans[plan_index], layer_index)
        old, new = before.moments[step][layer_index], after.moments[step][layer_index]
        assert len(rows) == sum(after.widths[step][layer_index])
        assert old["exp_avg"].abs().max() > 0
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(new[name], old[name][rows])
        assert new["step"] == old["step"] == step


def test_optimizer_and_scheduler_go_on(run):
    module, trainer, _, before, after = run
    assert len({id(optimizer) for optimizer in before.optimizers + after.optimizers}) == 1
    assert [rates[0] for rates in after.rates] == pytest.approx([1e-2 / (1 + step) for step in range(6)])
    in_model = {id(parameter) for parameter in module.lm.parameters()}
    in_optimizer = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert in_model == in_optimizer
    assert set(map(id, trainer.optimizers[0].state)) <= in_model


def test_training_continues_and_cut_parameters_move(run):
    _, _, _, before, after = run
    # The first moment after the cut is decayed and renewed by the next batch: it moved.
    for step in (2, 4):
        at_cut, next_step = after.moments[step][1]["exp_avg"], before.moments[step + 1][1]["exp_avg"]
        assert at_cut.shape == next_step.shape
        assert not torch.equal(at_cut, next_step)
        assert before.moments[step + 1][1]["step"] == step + 1


def test_nothing_is_left_behind(run):
    module, _, _, _, _ = run
    hooks = [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules()]
    assert sum(hooks) == 0
    assert not module._load_state_dict_pre_hooks
    assert all("forward" not in vars(layer.experts) for layer in moe_layers(module.lm))


def test_weights_really_move_in_plain_numbers():
    module = ForeignModule()
    seen = []

    class Weights(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append(moe_layers(pl_module.lm)[0].experts.down_proj.weight.detach().clone())

    pruning = ChannelPruning(schedule=[(1, 0.5)], method="uniform")
    quiet_trainer([ExpertCalibration(num_batches=1), pruning, Weights()], max_steps=3).fit(
        module, train_dataloaders=loader_of(token_batches())
    )
    assert [len(weight) for weight in seen] == [256, 128, 128]
    assert not torch.equal(seen[1], seen[2])


def test_two_schedules_keep_their_states_apart(tmp_path):
    first = ChannelPruning(schedule=[(1, 0.25)], method_args={"align": 8})
    second = ChannelPruning(schedule=[(2, 0.5)], method_args={"align": 16})
    module, checkpoint = ForeignModule(), ModelCheckpoint(dirpath=tmp_path, save_last=True)
    trainer = quiet_trainer(
        [ExpertCalibration(num_batches=1), first, second, checkpoint], max_steps=3, enable_checkpointing=True
    )
    trainer.fit(module, train_dataloaders=loader_of(token_batches()))
    assert first.state_key != second.state_key
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    assert [len(saved[callback.state_key]["plans"]) for callback in (first, second)] == [1, 1]
    assert second.plans[0].shape.num_channels == first.plans[0].num_kept == 384
    assert second.plans[0].num_kept == 256


def test_experts_leave_the_router_and_its_moments_too():
    module = ForeignModule()
    pruning = ChannelPruning(schedule=[(2, 0.25)], method="reap")
    trainer = quiet_trainer([ExpertCalibration(num_batches=2), pruning], max_steps=4)
    trainer.fit(module, train_dataloaders=loader_of(token_batches()))
    assert len(pruning.plans[0].evicted(0)) == 2
    router = moe_layers(module.lm)[0].router
    assert router.weight.shape == (6, 64)
    assert trainer.optimizers[0].state[router.weight]["exp_avg"].shape == router.weight.shape
    assert trainer.optimizers[0].state[router.weight]["step"] == 4


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize(
    ("stop", "method"), [(1, "exact_global"), (3, "exact_global"), (3, "reap"), (5, "exact_global")]
)
def test_a_resumed_run_ends_with_the_same_weights(tmp_path, stop, method):
    """Stopped before, between and after the cuts."""

    def fit(max_steps, *, ckpt_path=None):
        module = ForeignModule()
        pruning = ChannelPruning(schedule=SCHEDULE, method=method)
        checkpoint = ModelCheckpoint(dirpath=tmp_path / str(max_steps), save_last=True)
        trainer = quiet_trainer(
            [ExpertCalibration(num_batches=1), pruning, checkpoint],
            max_steps=max_steps,
            max_epochs=-1,
            enable_checkpointing=True,
            deterministic=True,
        )
        # Epochs of one batch: a plain loader cannot go on within one.
        trainer.fit(module, train_dataloaders=loader_of(token_batches(1)), ckpt_path=ckpt_path)
        return module, pruning

    whole, _ = fit(6)
    fit(stop)
    resumed, pruning = fit(6, ckpt_path=tmp_path / str(stop) / "last.ckpt")
    assert len(pruning.plans) == 2
    expected = whole.state_dict()
    assert expected.keys() == resumed.state_dict().keys()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.state_dict().items())
    assert not resumed._load_state_dict_pre_hooks


def test_schedule_counts_ratios_from_the_unpruned_model():
    # 25 % of 512 leaves 384, 50 % of 512 leaves 256: a third of what was left.
    assert NUM_CHANNELS == 512
    assert PruneSchedule(cuts=tuple(SCHEDULE)).due(step=4, num_done=1) == (2, 0.5)


class Factored(ForeignModule):
    def configure_optimizers(self):
        return torch.optim.Adafactor(self.lm.parameters(), lr=1e-3)


def test_an_optimizer_whose_state_has_no_rows_is_refused_before_the_first_batch():
    module, pruning = Factored(), ChannelPruning(schedule=[(1, 0.5)], method="reap")
    with pytest.raises(ValueError, match=r"^Adafactor cannot follow a cut during training: it keeps sums over rows"):
        quiet_trainer([ExpertCalibration(num_batches=1), pruning]).fit(
            module, train_dataloaders=loader_of(token_batches())
        )
    assert module.seen == []
