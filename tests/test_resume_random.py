"""Random numbers and epochs of a resumed run, in somebody else's loop without a language model."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning import LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from resume_runs import assert_same_run, prepare, run
from tiny_runs import quiet_trainer
from torch.utils.data import DataLoader

from callbacks.exact_resume import ExactResume
from lightning_moe.training.random_state import random_state, set_random_state

pytestmark = [
    pytest.mark.resume,
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Consider setting `persistent_workers=True`"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


class Draws(LightningModule):
    """Notes the batch and a random number of each generator, step by step."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.drawn = []

    def training_step(self, batch, batch_idx):
        self.drawn.append((torch.rand(()).item(), random.random(), np.random.rand(), batch.tolist()))
        return self.weight * batch.sum()

    def validation_step(self, batch, batch_idx):
        torch.rand(3)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def drawn(folder, *, resume=None, validate=True, keep=True, **when):
    """Three epochs of three batches; a resumed run starts from another seed."""
    seed_everything(0 if resume is None else 1, verbose=False)
    module = Draws()
    checkpoints = ModelCheckpoint(dirpath=folder, save_top_k=-1, filename="{step}", **when)
    trainer = quiet_trainer(
        [ExactResume(), checkpoints] if keep else [checkpoints],
        max_steps=-1,
        max_epochs=3,
        enable_checkpointing=True,
        limit_val_batches=1.0 if validate else 0,
    )
    loaders = DataLoader(torch.arange(6.0), batch_size=2, shuffle=True), DataLoader(torch.arange(4.0))
    trainer.fit(module, loaders[0], loaders[1] if validate else None, ckpt_path=resume)
    return module.drawn


BATCH_END = {"every_n_train_steps": 1}
EPOCH_END = {"every_n_epochs": 1, "save_on_train_epoch_end": True}
VALIDATION_END = {"every_n_epochs": 1, "save_on_train_epoch_end": False}


WHEN = [(BATCH_END, False), (BATCH_END, True), (EPOCH_END, False), (EPOCH_END, True), (VALIDATION_END, True)]


@pytest.mark.parametrize(("when", "validate"), WHEN)
@pytest.mark.parametrize("step", [3, 6])
def test_the_next_epochs_draw_the_same_numbers_in_the_same_order(tmp_path, when, validate, step):
    expected = drawn(tmp_path / "whole", validate=validate, **when)
    resumed = drawn(tmp_path / "x", resume=tmp_path / "whole" / f"step={step}.ckpt", validate=validate, **when)
    assert len(expected) == 9
    assert resumed == expected[step:]


@pytest.mark.parametrize("step", [1, 2, 5])
def test_within_an_epoch_numbers_and_batches_go_on(tmp_path, step):
    expected = drawn(tmp_path / "whole", **BATCH_END)
    resumed = drawn(tmp_path / "x", resume=tmp_path / "whole" / f"step={step}.ckpt", **BATCH_END)
    assert resumed == expected[step:]


def test_validation_moves_no_numbers_of_training(tmp_path):
    assert drawn(tmp_path, validate=True, **BATCH_END) == drawn(tmp_path, validate=False, **BATCH_END)


def test_without_it_the_numbers_are_others(tmp_path):
    expected = drawn(tmp_path / "whole", keep=False, **EPOCH_END)
    assert drawn(tmp_path / "x", keep=False, resume=tmp_path / "whole" / "step=3.ckpt", **EPOCH_END) != expected[3:]


def process_of(size):
    return SimpleNamespace(world_size=size, fit_loop=SimpleNamespace(_combined_loader=None))


def test_several_processes_keep_their_own_numbers():
    callback, state = ExactResume(), random_state()
    expected = torch.rand(1)
    callback.load_state_dict(state)
    callback.on_fit_start(process_of(2), None)
    assert torch.rand(1) != expected
    callback.on_fit_start(process_of(1), None)
    assert torch.rand(1) == expected


def test_what_a_validation_loaded_is_forgotten():
    callback, state = ExactResume(), random_state()
    expected = torch.rand(1)
    callback.load_state_dict(state)
    callback.teardown(None, None, "validate")
    callback.on_fit_start(process_of(1), None)
    assert torch.rand(1) != expected


def test_states_are_plain_and_come_back(tmp_path):
    torch.save(random_state(), tmp_path / "state.pt")
    first = (torch.rand(3).tolist(), random.random(), random.gauss(0, 1), np.random.randn())
    set_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert (torch.rand(3).tolist(), random.random(), random.gauss(0, 1), np.random.randn()) == first


def test_an_epoch_that_max_steps_cut_short_is_read_on(tmp_path):
    """Lightning counts it as done in a checkpoint that is written after the last step."""
    prepare(tmp_path)
    expected = run("one_shot", tmp_path, name="whole")
    _, trainer, _ = run("one_shot", tmp_path, name="part", max_steps=4)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert torch.load(tmp_path / "end.ckpt", weights_only=True)["epoch"] == 1
    assert_same_run(run("one_shot", tmp_path, name="more", resume=tmp_path / "end.ckpt"), expected)
