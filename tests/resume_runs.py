"""Runs that are stopped or killed and go on: one function makes each mode's module, callbacks and data.

As a program: `python resume_runs.py MODE FOLDER FUNCTION CALL`, a run that kills itself.
"""

import importlib
import io
import itertools
import os
import signal
import sys
import warnings
from pathlib import Path

import torch
from lightning import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_models import random_tokens, tiny_model
from tiny_runs import ForeignModule, ForeignWithLoader, loader_of, quiet_trainer, save_model, save_text, text_module

from callbacks import ChannelPruning, ExpertCalibration, ExpertPruning, Recovery
from lightning_moe.adapters.inject import AdapterConfig
from lightning_moe.training.module import LanguageModelModule, RecoveryModule

STEPS = 6
ALIGN = {"align": 8}
SCHEDULE = [(1, 0.2), (4, 0.4)]
ADAPTER = AdapterConfig(expert_rank=2, router_rank=8, attention_rank=2)


class Reads(Callback):
    """Which rows were read, by step."""

    def __init__(self):
        self.batches = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(batch["input_ids"].clone())


def kill_at(target, *, call):
    """SIGKILL to this very process when a function (`package.module:name` or `:Class.name`) is called that often."""
    module_name, _, path = target.partition(":")
    *owners, name = path.split(".")
    owner = importlib.import_module(module_name)
    for part in owners:
        owner = getattr(owner, part)
    function, calls = getattr(owner, name), itertools.count(1)

    def counted(*args, **kwargs):
        if name == "save" and ".last.ckpt." not in args[1].name:
            return function(*args, **kwargs)
        if next(calls) == call:
            if name == "save":  # half of it is on the disk
                whole = io.BytesIO()
                function(args[0], whole)
                args[1].write(whole.getvalue()[: whole.tell() // 2])
                args[1].flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    setattr(owner, name, counted)


class DropoutModule(ForeignWithLoader):
    """Draws from torch's generator in each step."""

    def training_step(self, batch, batch_idx):
        kept = torch.rand(batch["input_ids"].shape) < 0.7
        return super().training_step(batch | {"labels": batch["labels"].where(kept, -100)}, batch_idx)


def recovery(**settings):
    """Learning rates do not depend on where the run is to stop."""
    fixed = {"gradient_checkpointing": False, "schedule": "constant_with_warmup", "warmup_ratio": 0.0}
    rates = {"expert_learning_rate": 1e-2, "router_learning_rate": 1e-3, "attention_learning_rate": 1e-2}
    return lambda folder: RecoveryModule(source=str(folder / "model"), **(fixed | rates | settings))


def distilled(folder):
    return recovery(teacher=str(folder / "model"))(folder)


def whole(folder):
    return LanguageModelModule(
        source=str(folder / "model"), learning_rate=1e-3, schedule="constant_with_warmup", warmup_ratio=0.0
    )


def foreign_batches():
    batches = []
    for seed in range(4):
        ids = random_tokens(batch=2, length=16, seed=seed)
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
    return loader_of(batches, shuffle=True)


def foreign(folder):
    return DropoutModule(model=tiny_model(attention_dropout=0.1), loader=foreign_batches())


def one_shot():
    return [ExpertCalibration(), ChannelPruning(prune_ratio=0.5, method_args=ALIGN), Recovery(adapter=ADAPTER)]


def scheduled(*, window=None, **settings):
    return [
        ExpertCalibration(window=window),
        ChannelPruning(schedule=SCHEDULE, **({"method_args": ALIGN} | settings)),
    ]


def mixed():
    return [
        ExpertCalibration(),
        ExpertPruning(schedule=[(2, 0.25)]),
        ChannelPruning(schedule=[(1, 0.1), (4, 0.5)], method_args=ALIGN),
        Recovery(adapter=ADAPTER),
    ]


# Name of a mode -> its module, its callbacks, and settings of the trainer.
MODES = {
    "one_shot": (recovery(), one_shot, {}),
    "whole": (whole, scheduled, {}),
    "nf4": (recovery(), lambda: [*scheduled(), Recovery(adapter=ADAPTER)], {}),
    "experts": (recovery(), mixed, {}),
    "distilled": (distilled, lambda: [*scheduled(), Recovery(adapter=ADAPTER)], {}),
    "window": (recovery(), lambda: [*scheduled(window=2), Recovery(adapter=ADAPTER)], {}),
    "norms": (recovery(), lambda: [Recovery(adapter=AdapterConfig(expert_rank=2, train_norms=True))], {}),
    "accumulated": (whole, scheduled, {"accumulate_grad_batches": 2}),
    "foreign": (foreign, lambda: [ExpertCalibration(num_batches=2), *scheduled()[1:]], {}),
    "foreign_nf4": (foreign, lambda: [ExpertCalibration(num_batches=2), *one_shot()[1:]], {}),
}


def prepare(folder):
    """A model and text, six rows of data and three batches an epoch, so that runs of six steps see two epochs."""
    save_text(folder)
    save_model(folder / "model")
    return folder


def run(mode, folder, *, name, max_steps=STEPS, resume=None, spies=(), **trainer_settings):
    """One run of a mode; checkpoints after every step go to `folder/name`."""
    seed_everything(0, verbose=False)
    make_module, make_callbacks, settings = MODES[mode]
    module, reads = make_module(folder), Reads()
    checkpoints = ModelCheckpoint(dirpath=folder / name, every_n_train_steps=1, save_last=True, save_top_k=-1)
    trainer = quiet_trainer(
        [*make_callbacks(), reads, *spies, checkpoints],
        **({"max_steps": max_steps, "enable_checkpointing": True, "deterministic": True} | settings | trainer_settings),
    )
    data = {} if isinstance(module, ForeignModule) else {"datamodule": text_module(folder, validation=None)}
    trainer.fit(module, **data, ckpt_path=resume)
    return module, trainer, reads.batches


def moments(trainer):
    """Adam's state, parameter by parameter in the order of the groups."""
    (optimizer,) = trainer.optimizers
    return [optimizer.state[p] for group in optimizer.param_groups for p in group["params"] if p in optimizer.state]


def assert_same_run(resumed, expected):
    """Weights, moments and the batches that both have read."""
    (module, trainer, batches), (other, other_trainer, other_batches) = resumed, expected
    mine, theirs = module.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    assert [name for name, value in mine.items() if not torch.equal(value, theirs[name])] == []
    states, other_states = moments(trainer), moments(other_trainer)
    assert len(states) == len(other_states) > 0
    for state, wanted in zip(states, other_states, strict=True):
        assert all(torch.equal(state[key], wanted[key]) for key in wanted)
    assert all(torch.equal(*pair) for pair in zip(batches, other_batches[-len(batches) :], strict=True))


def main(mode, folder, target, call):
    """The child process: `target` and `call` as in `kill_at`; a call of 0 lets it run to its end."""
    warnings.filterwarnings("ignore")
    if int(call):
        kill_at(target, call=int(call))
    run(mode, Path(folder), name="killed", max_steps=STEPS if int(call) else 200)


if __name__ == "__main__":
    main(*sys.argv[1:])
