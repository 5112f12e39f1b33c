"""Every callback under the Trainer's settings: short runs, shares of the data, precision, accumulation, clipping."""

import copy
import warnings

import pytest
import torch
from lightning import Callback, Trainer
from manners import IN_TRAINING, NUM_CHANNELS, VARIANTS, Everyone, Widths, hooks_in, is_consistent, num_channels
from tiny_runs import ForeignModule, loader_of, quiet_trainer, token_batches

from callbacks import ChannelPruning, ExpertCalibration

HALF = NUM_CHANNELS // 2
EXPECTED = {1: 384, 2: HALF}  # channels after the cut of this step


def fit(name, *, num_batches=8, **settings):
    """Fits with one epoch of batches and two validation loaders; returns module, trainer and widths by batch."""
    module, widths = Everyone(), Widths()
    trainer = quiet_trainer([*VARIANTS[name](), widths], **({"max_epochs": 1, "max_steps": -1} | settings))
    validation = [loader_of(token_batches(4, seed=1)), loader_of(token_batches(4, seed=2))]
    trainer.fit(module, train_dataloaders=loader_of(token_batches(num_batches)), val_dataloaders=validation)
    is_consistent(module, trainer)
    assert len(widths.optimizers) == 1
    assert all(torch.tensor(module.losses).isfinite())
    return module, trainer, widths


def channels_at(name, step):
    """By the schedule; before step 1 the model of a one-shot cut is cut already."""
    if name not in IN_TRAINING:
        return HALF
    return NUM_CHANNELS if step == 0 else EXPECTED[min(step, 2)]


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("num_batches", [True, 3])
def test_fast_dev_run(name, num_batches):
    _, trainer, widths = fit(name, fast_dev_run=num_batches, limit_val_batches=1.0)
    assert trainer.global_step == int(num_batches)
    assert widths.seen == [channels_at(name, step) for step in range(int(num_batches))]


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(
    ("settings", "num_steps"),
    [
        ({"limit_train_batches": 4, "limit_val_batches": 2}, 4),
        ({"limit_train_batches": 0.5, "limit_val_batches": 0.5}, 4),
        ({"overfit_batches": 3}, 3),
        ({"overfit_batches": 0.5}, 4),
        ({"val_check_interval": 2, "limit_val_batches": 1.0, "limit_train_batches": 4}, 4),
        ({"val_check_interval": 0.25, "limit_val_batches": 1, "num_sanity_val_steps": 2}, 8),
        ({"barebones": True, "limit_val_batches": 1.0, "max_steps": 3}, 3),
        ({"gradient_clip_val": 0.1, "max_steps": 4}, 4),
        ({"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value", "max_steps": 4}, 4),
        ({"precision": "bf16-mixed", "limit_val_batches": 1, "max_steps": 4}, 4),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_of_the_trainer(name, settings, num_steps):
    with warnings.catch_warnings():
        # What a bare trainer warns about is that it has no logger and no bars.
        warnings.filterwarnings("ignore", message=".*barebones.*")
        warnings.filterwarnings("ignore", message=".*overfit.*")
        module, trainer, widths = fit(name, **settings)
    assert trainer.global_step == num_steps
    assert widths.seen == [channels_at(name, step) for step in range(num_steps)]
    assert num_channels(module.lm) == HALF


@pytest.mark.parametrize("name", VARIANTS)
def test_the_sanity_check_sees_the_model_before_any_scheduled_cut(name):
    seen = []

    class AtSanityCheck(Callback):
        def on_validation_batch_start(self, trainer, pl_module, *_):
            if trainer.sanity_checking:
                seen.append(num_channels(pl_module.lm))

    module = Everyone()
    trainer = quiet_trainer(
        [*VARIANTS[name](), AtSanityCheck()], max_steps=3, num_sanity_val_steps=2, limit_val_batches=1.0
    )
    batches = loader_of(token_batches(4))
    trainer.fit(module, train_dataloaders=batches, val_dataloaders=batches)
    assert seen == [channels_at(name, 0)] * 2
    is_consistent(module, trainer)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_cut_never_falls_between_the_batches_of_a_step(name):
    _, trainer, widths = fit(name, accumulate_grad_batches=2)
    assert trainer.global_step == 4
    assert widths.seen == [channels_at(name, batch // 2) for batch in range(8)]


@pytest.mark.parametrize("name", ["scheduled", "experts"])
def test_two_half_batches_cut_and_train_like_one(name):
    """Equal lengths, so the mean of two means is the mean; calibration batches are the same text."""
    halves = token_batches(8)
    pairs = [
        {key: torch.cat([first[key], second[key]]) for key in first}
        for first, second in zip(halves[::2], halves[1::2], strict=True)
    ]

    def trained(batches, **settings):
        module = ForeignModule()
        calibration, pruning, *_ = VARIANTS[name]()
        calibration._loaders = {"train": halves[:2]}
        quiet_trainer([calibration, pruning], max_epochs=1, max_steps=-1, **settings).fit(module, loader_of(batches))
        return module.lm.state_dict()

    whole, accumulated = trained(pairs), trained(halves, accumulate_grad_batches=2)
    assert whole.keys() == accumulated.keys()
    for key, value in whole.items():
        torch.testing.assert_close(accumulated[key], value, rtol=1e-3, atol=2e-4)


def gradient_norms(name, **settings):
    norms = []

    class Norms(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            gradients = [p.grad for p in pl_module.lm.parameters() if p.grad is not None]
            norms.append((torch.cat([g.flatten() for g in gradients]).norm().item(), gradients))

    module = Everyone()
    trainer = quiet_trainer([*VARIANTS[name](), Norms()], max_steps=4, **settings)

    class Clipped(type(trainer.precision_plugin)):
        def clip_gradients(self, optimizer, *args, **kwargs):
            super().clip_gradients(optimizer, *args, **kwargs)
            gradients = [p.grad for p in module.lm.parameters() if p.grad is not None]
            norms[-1] = (*norms[-1], torch.cat([g.flatten() for g in gradients]))

    trainer.strategy.precision_plugin = Clipped()
    trainer.fit(module, loader_of(token_batches()))
    return [clipped for _, _, clipped in norms]


@pytest.mark.parametrize("name", ["scheduled", "experts", "scheduled_recovery"])
def test_gradients_of_the_parameters_after_a_cut_are_clipped(name):
    by_norm = gradient_norms(name, gradient_clip_val=0.01)
    assert [gradient.norm().item() for gradient in by_norm] == pytest.approx([0.01] * 4, rel=1e-3)
    by_value = gradient_norms(name, gradient_clip_val=1e-5, gradient_clip_algorithm="value")
    assert [gradient.abs().max().item() for gradient in by_value] == pytest.approx([1e-5] * 4)


@pytest.mark.parametrize("name", ["one_shot", "scheduled"])
def test_mixed_precision_keeps_the_weights_in_fp32_and_cuts_the_same_channels(name):
    """Statistics before training are in the model's own type: a one-shot cut does not depend on the precision."""

    def plans(precision):
        module, (calibration, pruning) = Everyone(), VARIANTS[name]()
        trainer = quiet_trainer([calibration, pruning], max_steps=3, precision=precision)
        trainer.fit(module, loader_of(token_batches()))
        assert {p.dtype for p in module.lm.parameters()} == {torch.float32}
        return pruning.plans

    mixed, plain = plans("bf16-mixed"), plans("32-true")
    assert [plan.num_kept for plan in mixed] == [plan.num_kept for plan in plain]
    if name == "one_shot":
        assert mixed[0].digest == plain[0].digest


def test_settings_leave_no_hook_behind():
    module, _, _ = fit("scheduled", max_steps=3)
    assert hooks_in(module) == 0


def test_a_trainer_can_be_used_twice():
    """A second `fit` of the same trainer goes on; the schedule is not done again."""
    module, (calibration, pruning) = Everyone(), VARIANTS["scheduled"]()
    trainer = quiet_trainer([calibration, pruning], max_epochs=1, max_steps=-1)
    loader = loader_of(token_batches(4))
    trainer.fit(module, train_dataloaders=loader)
    plans = copy.copy(pruning.plans)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, train_dataloaders=loader)
    assert (trainer.global_step, pruning.plans) == (8, plans)
    is_consistent(module, trainer)


def test_anomaly_detection_and_the_profiler():
    pruning = ChannelPruning(schedule=[(1, 0.5)])
    trainer: Trainer = quiet_trainer(
        [ExpertCalibration(num_batches=1), pruning], max_steps=3, detect_anomaly=True, profiler="simple"
    )
    trainer.fit(Everyone(), loader_of(token_batches(3)))
    assert [plan.num_kept for plan in pruning.plans] == [HALF]
