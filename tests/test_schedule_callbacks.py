"""Scheduled cuts inside Lightning: what is calibrated on, accumulation, precision, recovery under 4 bit, messages."""

import logging

import pytest
import torch
from lightning import Callback, LightningModule
from tiny_runs import (
    ForeignModule,
    loader_of,
    quiet_trainer,
    save_model,
    save_text,
    text_module,
    token_batches,
)

import callbacks.calibration
from callbacks import ChannelPruning, ExpertCalibration, Recovery
from callbacks._pruning import Pruning
from lightning_moe import cli
from lightning_moe.adapters.inject import AdapterConfig
from lightning_moe.calibration.collector import collect_statistics
from lightning_moe.models.discovery import model_shape, moe_layers
from lightning_moe.surgery.schedule import GradualSchedule
from lightning_moe.training.module import RecoveryModule

pytestmark = pytest.mark.schedule
SCHEDULE = [(2, 0.25), (4, 0.5)]


def pruning(**overrides):
    return ChannelPruning(**({"schedule": SCHEDULE, "method_args": {"align": 8}} | overrides))


def fit(module, trainer_callbacks, **settings):
    trainer = quiet_trainer(trainer_callbacks, **({"max_steps": 6} | settings))
    trainer.fit(module, train_dataloaders=loader_of(token_batches(16)))
    return trainer


class ByHand(Callback):
    """Before a cut: statistics of the model as it is, on the batches that training saw last."""

    def __init__(self, *, window):
        self.window, self.digests, self.modes = window, [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.modes.append(all(module.training for module in pl_module.lm.modules()))
        if trainer.global_step in (2, 4) and batch_idx % trainer.accumulate_grad_batches == 0:
            seen = [{"input_ids": ids} for ids in pl_module.seen[-self.window :]]
            seen = [one | {"attention_mask": torch.ones_like(one["input_ids"])} for one in seen]
            statistics = collect_statistics(pl_module.lm, loaders={"train": seen}, progress=False)
            self.digests.append(statistics.digest)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("window", [1, 3])
def test_a_window_is_the_last_training_batches_on_the_model_as_it_is(window, accumulate):
    cut, by_hand = pruning(), ByHand(window=window)
    settings = {"accumulate_grad_batches": accumulate, "gradient_clip_val": 1.0}
    fit(ForeignModule(), [by_hand, ExpertCalibration(window=window), cut], **settings)
    assert [plan.provenance["statistics"] for plan in cut.plans] == by_hand.digests
    assert len(by_hand.digests) == 2
    assert all(by_hand.modes)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: [ExpertCalibration(window=1), pruning()], 2),
        (lambda: [ExpertCalibration(num_batches=1), pruning()], 2),
        (lambda: [ExpertCalibration(num_batches=1), pruning(schedule=None, prune_ratio=0.1), pruning()], 3),
        (lambda: [ExpertCalibration(num_batches=1)], 1),
    ],
)
def test_nothing_is_calibrated_that_nobody_asks_for(monkeypatch, make, expected):
    calls = []

    def counted(model, **settings):
        calls.append(sum(model_shape(model).layers[0].widths))
        return collect_statistics(model, **settings)

    monkeypatch.setattr(callbacks.calibration, "collect_statistics", counted)
    fit(ForeignModule(), make())
    assert len(calls) == expected


def test_a_cut_waits_for_the_end_of_an_accumulation():
    class Spy(Callback):
        def __init__(self):
            self.widths = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.widths.append(model_shape(pl_module.lm).num_channels)

    spy = Spy()
    fit(ForeignModule(), [ExpertCalibration(num_batches=1), pruning(), spy], accumulate_grad_batches=2)
    assert spy.widths == [512] * 4 + [384] * 4 + [256] * 4


def test_bf16_mixed_calibrates_as_it_trains():
    module, cut = ForeignModule(), pruning()
    seen = []

    class Types(Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            moe_layers(pl_module.lm)[0].experts.register_forward_pre_hook(
                lambda experts, args: seen.append((experts.training, args[0].dtype))
            )

    trainer = fit(module, [ExpertCalibration(window=1), Types(), cut], precision="bf16-mixed")
    assert trainer.global_step == 6
    assert {dtype for _, dtype in seen} == {torch.bfloat16} or {dtype for _, dtype in seen} == {torch.float32}
    assert [plan.num_kept for plan in cut.plans] == [384, 256]


class Manual(LightningModule):
    """Manual optimization with two optimizers: `global_step` counts the steps of both."""

    automatic_optimization = False

    def __init__(self):
        super().__init__()
        self.lm = ForeignModule().lm

    def training_step(self, batch, batch_idx):
        self.manual_backward(self.lm(**batch).loss)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self):
        experts = [p for name, p in self.lm.named_parameters() if ".experts." in name]
        rest = [p for name, p in self.lm.named_parameters() if ".experts." not in name]
        return torch.optim.AdamW(experts, lr=1e-3), torch.optim.SGD(rest, lr=1e-2, momentum=0.9)


def test_manual_optimization_with_two_optimizers():
    module, cut = Manual(), pruning(method="reap", method_args=None)
    trainer = fit(module, [ExpertCalibration(num_batches=1), cut], max_steps=8)
    assert [plan.num_kept for plan in cut.plans] == [384, 256]
    held = {id(p) for one in trainer.optimizers for group in one.param_groups for p in group["params"]}
    assert held == {id(parameter) for parameter in module.lm.parameters()}
    router = moe_layers(module.lm)[0].router.weight
    assert trainer.optimizers[1].state[router]["momentum_buffer"].shape == router.shape == (4, 64)


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
@pytest.mark.parametrize("quantize", ["nf4", "none"])
def test_recovery_trains_adapters_while_experts_shrink(tmp_path, quantize):
    module = RecoveryModule(
        source=save_model(tmp_path / "model"), gradient_checkpointing=True, schedule="constant_with_warmup"
    )
    cut = pruning(schedule=GradualSchedule(shape="cubic", begin=0, end=3, num_cuts=2, prune_ratio=0.5))
    adapters = AdapterConfig(expert_rank=2, router_rank=2, train_norms=True)
    callbacks_ = [ExpertCalibration(window=2), cut, Recovery(quantize=quantize, adapter=adapters)]
    trainer = quiet_trainer(callbacks_, max_steps=5)
    trainer.fit(module, datamodule=text_module(save_text(tmp_path), calibration=None, validation=None))
    assert [plan.num_kept for plan in cut.plans] == [264, 256]  # 265.5 = 512 (1 - 0.5 (1 - (1/3)^3)), in blocks of 8
    assert model_shape(module.language_model).num_channels == 256
    assert all(layer.base_experts.packed == (quantize == "nf4") for layer in moe_layers(module.language_model))
    (optimizer,) = trainer.optimizers
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(p) for p in module.parameters() if p.requires_grad} == set(map(id, optimizer.state))
    assert {int(state["step"]) for state in optimizer.state.values()} == {5}
    assert torch.isfinite(trainer.callback_metrics["train_loss"])


@pytest.mark.parametrize(
    ("settings", "end"),
    [
        ({"max_steps": 6}, 6),
        ({"max_steps": -1, "max_epochs": 1, "limit_train_batches": 5}, 5),
        ({"max_steps": -1, "max_epochs": 3, "limit_train_batches": 5, "accumulate_grad_batches": 2}, 9),
        ({"max_steps": -1, "max_epochs": 2, "limit_train_batches": 5}, None),
    ],
)
def test_a_schedule_beyond_the_end_of_training_is_said(caplog, settings, end):
    with caplog.at_level(logging.WARNING):
        fit(ForeignModule(), [ExpertCalibration(num_batches=1), pruning(schedule=[(2, 0.25), (9, 0.5)])], **settings)
    said = f"goes from step 2 to step 9 and training ends at step {end}: cuts from there on are not made"
    assert (said in caplog.text) == (end is not None)
    assert ("goes from step" in caplog.text) == (end is not None)


class Reads(torch.utils.data.DataLoader):
    """A stateful loader: reading a batch too many would show."""

    num_iterators = 0

    def __iter__(self):
        self.num_iterators += 1
        return super().__iter__()


def test_the_end_of_training_is_known_without_reading():
    loaders = [Reads(token_batches(8), batch_size=None) for _ in range(2)]
    for loader, end in zip(loaders, (2, 9), strict=True):
        callbacks_ = [ExpertCalibration(window=1), pruning(schedule=[(2, 0.25), (end + 1, 0.5)])]
        quiet_trainer(callbacks_, max_steps=-1, max_epochs=1).fit(ForeignModule(), train_dataloaders=loader)
    assert [loader.num_iterators for loader in loaders] == [1, 1]


def test_the_end_of_manual_optimization_is_not_guessed(caplog):
    """8 batches of 2 steps each: the cut at step 12 is made."""
    module, cut = Manual(), pruning(schedule=[(12, 0.5)])
    with caplog.at_level(logging.WARNING):
        fit(module, [ExpertCalibration(num_batches=1), cut], max_steps=-1, max_epochs=1, limit_train_batches=8)
    assert len(cut.plans) == 1
    assert "goes from step" not in caplog.text


def test_the_line_of_a_cut(caplog):
    with caplog.at_level(logging.INFO, logger="lightning_moe.surgery.pruner"):
        fit(ForeignModule(), [ExpertCalibration(window=1), pruning()])
    lines = [record.getMessage() for record in caplog.records if record.name == "lightning_moe.surgery.pruner"]
    assert [line.split(",")[0] for line in lines] == [
        "Step 2: 384 of 512 channels kept (75.0 %)",
        "Step 4: 256 of 512 channels kept (50.0 %)",
    ]


def test_a_calibration_that_fails_leaves_the_model_as_it_was():
    class Odd(ForeignModule):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx == 1:
                moe_layers(self.lm)[1].experts.down_proj.weight.data[:] = float("nan")

    module = Odd()
    with pytest.raises(ValueError, match="NaN or infinity in batch 1 of corpus 'train'"):
        fit(module, [ExpertCalibration(window=1), pruning()])
    assert model_shape(module.lm).num_channels == 512
    assert all(part.training for part in module.lm.modules())
    assert sum(len(part._forward_hooks) for part in module.modules()) == 0
    assert all("forward" not in vars(layer.experts) for layer in moe_layers(module.lm))


def test_the_window_of_a_checkpoint():
    calibration = ExpertCalibration(window=2)
    fit(ForeignModule(), [calibration, pruning(schedule=[(9, 0.5)])], max_steps=3)
    state = calibration.state_dict()
    batches = token_batches(3)
    assert [one["input_ids"].dtype for one in state["batches"][0]] == [torch.int32] * 2
    for stored, batch in zip(state["batches"][0], batches[1:], strict=True):
        assert torch.equal(stored["input_ids"].long(), batch["input_ids"])
    resumed = ExpertCalibration(window=2)
    resumed.load_state_dict(state)
    again = resumed.state_dict()["batches"][0]
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(again, state["batches"][0], strict=True))
    # Written by two processes, read by one.
    two = {"batches": [[batches[0]], [batches[1]]]}
    resumed.load_state_dict(two)
    assert len(resumed.state_dict()["batches"][0]) == 2


def test_a_window_needs_token_ids():
    class Tuples(ForeignModule):
        def training_step(self, batch, batch_idx):
            raise AssertionError("nothing is trained")

    batches = [(batch["input_ids"],) for batch in token_batches()]
    with pytest.raises(ValueError, match=r"with `input_ids`, got .*Calibrate on `data.calibration`, or let the train"):
        quiet_trainer([ExpertCalibration(window=1), pruning()]).fit(Tuples(), train_dataloaders=loader_of(batches))


class ParseOnly(cli.CompressionCLI):
    """Builds what was asked for and runs nothing."""

    def _run_subcommand(self, subcommand):
        pass


@pytest.mark.parametrize("group", ["pruning", "expert_pruning"])
def test_the_command_line_reads_a_list_and_a_curve(monkeypatch, group):
    monkeypatch.setattr(cli, "CompressionCLI", ParseOnly)
    monkeypatch.setattr("sys.argv", ["lightning_moe"])  # LightningCLI warns when it gets both

    def parsed(schedule):
        arguments = ["fit", "--model=LanguageModelModule", "--model.source=asset:small_moe", "--trainer.logger=false"]
        arguments += [f"--{group}={cli.CALLBACK_GROUPS[group]}", f"--{group}.schedule={schedule}"]
        made = cli.train(
            [*arguments, "--data.tokenizer=asset:small_moe", "--trainer.accelerator=cpu", "--seed_everything=0"]
        )
        return next(one for one in made.trainer.callbacks if isinstance(one, Pruning)).schedule.cuts

    assert parsed("[[100, 0.25], [200, 0.5]]") == ((100, 0.25), (200, 0.5))
    curve = parsed("{shape: cubic, begin: 100, end: 1000, num_cuts: 5, prune_ratio: 0.5}")
    assert [step for step, _ in curve] == [280, 460, 640, 820, 1000]


@pytest.mark.parametrize("repair", [True, False])
def test_a_schedule_says_that_its_cuts_are_not_repaired(caplog, repair):
    caplog.set_level(logging.INFO, logger="callbacks")
    fit(ForeignModule(), [ExpertCalibration(num_batches=1), pruning(repair=repair)])
    said = "cuts of the schedule are made without a repair, which `repair: true` is for a cut before training only"
    assert (said in caplog.text) is repair
