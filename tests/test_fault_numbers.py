"""NaN, infinity and overflow in training: it stops at that step, says where, and harms neither weights nor files."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_runs import quiet_trainer, save_model, save_text, text_module

from callbacks import ChannelPruning, ExpertCalibration, Recovery
from lightning_moe.adapters.inject import AdapterConfig
from lightning_moe.models.discovery import moe_layers
from lightning_moe.training.module import LanguageModelModule, RecoveryModule

pytestmark = pytest.mark.fault

ADAPTER = AdapterConfig(expert_rank=2, router_rank=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = save_text(tmp_path_factory.mktemp("numbers"))
    save_model(folder / "model")
    return folder


class Watched(LanguageModelModule):
    """Its third step goes wrong, in the way that a subclass says."""

    def on_train_batch_start(self, batch, batch_idx):
        super().on_train_batch_start(batch, batch_idx)
        self.before = {name: value.detach().clone() for name, value in self.named_parameters()}

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == 2:
            self.spoil_model()
        loss = super().training_step(batch, batch_idx)
        return self.spoil_loss(loss) if self.trainer.global_step == 2 else loss

    def spoil_model(self):
        """Nothing."""

    def spoil_loss(self, loss):
        return loss


class NaNLoss(Watched):
    def spoil_loss(self, loss):
        return loss * float("nan")


class OverflowingExpert(Watched):
    """Its weights are large, and what it computes from them is infinite."""

    def spoil_model(self):
        with torch.no_grad():
            moe_layers(self.language_model)[1].experts.gate_up_proj[5].fill_(1e30)


class DamagedExpert(Watched):
    def spoil_model(self):
        with torch.no_grad():
            moe_layers(self.language_model)[0].experts.down_proj[2, 3, 4] = float("nan")


class OverflowingGradient(Watched):
    def spoil_model(self):
        self.language_model.model.norm.weight.register_hook(lambda gradient: gradient * float("inf"))


def train(module, folder, *, checkpoints, callbacks=(), **settings):
    """Four steps, a checkpoint after each."""
    checkpoint = ModelCheckpoint(dirpath=checkpoints, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = quiet_trainer([*callbacks, checkpoint], enable_checkpointing=True, **{"max_steps": 4} | settings)
    trainer.fit(module, datamodule=text_module(folder))
    return trainer


def saved_steps(folder):
    return sorted(path.stem for path in folder.iterdir())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_that_is_nan_stops_before_the_weights_see_it(folder, tmp_path, accumulate):
    module = NaNLoss(source=str(folder / "model"))
    match = (
        r"Step 3: NaN or infinity in the loss \(train_loss 8\.\d+\); all decoder layers are finite.*Lower the learning"
    )
    with pytest.raises(ValueError, match=match):
        train(module, folder, checkpoints=tmp_path, accumulate_grad_batches=accumulate)
    assert all(torch.equal(value, module.before[name]) for name, value in module.named_parameters())
    assert saved_steps(tmp_path) == ["step=1", "step=2"]
    saved = torch.load(tmp_path / "step=2.ckpt")["state_dict"]
    assert all(torch.equal(value, module.before[name]) for name, value in saved.items())


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        (
            OverflowingExpert,
            r"first in expert 5, whose weights are finite \(an overflow\) of 'model.layers.1.mlp.experts'",
        ),
        (DamagedExpert, r"because the weights 'model.model.layers.0.mlp.experts.down_proj' are not finite"),
        (
            OverflowingGradient,
            r"Step 3: NaN or infinity in the gradients of 1 of \d+ tensors, first of 'model.model",
        ),
    ],
)
def test_the_message_says_where_it_began(folder, tmp_path, kind, match):
    module = kind(source=str(folder / "model"))
    with pytest.raises(ValueError, match=match):
        train(module, folder, checkpoints=tmp_path)
    assert saved_steps(tmp_path) == ["step=1", "step=2"]


class NaNOnce(RecoveryModule):
    """A loss that is NaN in the third step, as a bad row of text may make it."""

    broken = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if self.broken and self.trainer.global_step == 2 else loss


def recover(folder, *, checkpoints, broken=False, ckpt_path=None):
    torch.manual_seed(0)
    module = NaNOnce(source=str(folder / "model"), expert_learning_rate=1e-2, router_loss=0.01)
    module.broken = broken
    pruning = ChannelPruning(prune_ratio=0.5, method_args={"align": 8})
    callbacks = [ExpertCalibration(), pruning, Recovery(adapter=ADAPTER)]
    checkpoint = ModelCheckpoint(dirpath=checkpoints, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = quiet_trainer([*callbacks, checkpoint], enable_checkpointing=True, max_steps=4)
    trainer.fit(module, datamodule=text_module(folder), ckpt_path=ckpt_path)
    return {name: value.detach() for name, value in module.named_parameters() if value.requires_grad}


def test_a_recovery_goes_on_from_the_checkpoint_before_the_nan_to_the_same_weights(folder, tmp_path):
    undisturbed = recover(folder, checkpoints=tmp_path / "whole")
    with pytest.raises(ValueError, match=r"Step 3: NaN or infinity in the loss \(router_loss .*, train_loss 8"):
        recover(folder, checkpoints=tmp_path / "stopped", broken=True)
    assert saved_steps(tmp_path / "stopped") == ["step=1", "step=2"]
    resumed = recover(folder, checkpoints=tmp_path / "stopped", ckpt_path=str(tmp_path / "stopped" / "step=2.ckpt"))
    assert resumed.keys() == undisturbed.keys()
    assert all(torch.equal(value, undisturbed[name]) for name, value in resumed.items())


@pytest.mark.parametrize(
    ("make", "callbacks", "match"),
    [
        (
            lambda source: LanguageModelModule(source=source, learning_rate=1e30, warmup_ratio=0.0),
            list,
            r"Step 2: NaN or infinity in the loss.*Lower the learning rate",
        ),
        (
            lambda source: RecoveryModule(source=source, expert_learning_rate=1e39, warmup_ratio=0.0),
            lambda: [Recovery(adapter=ADAPTER)],
            r"After step 1: the weights '.*lora_.*' are not finite\. This checkpoint is not written.*Lower the",
        ),
    ],
)
def test_an_absurd_learning_rate_ends_in_a_line(folder, tmp_path, make, callbacks, match):
    """Where weights become infinite in a step whose loss was not, the checkpoint after it is refused."""
    with pytest.raises(ValueError, match=match):
        train(make(str(folder / "model")), folder, checkpoints=tmp_path, callbacks=callbacks())
    for path in tmp_path.iterdir():
        assert all(value.isfinite().all() for value in torch.load(path)["state_dict"].values())


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"expert_learning_rate": float("nan")}, "`expert_learning_rate` must be a finite number, 0 or more, got nan"),
        ({"router_learning_rate": float("inf")}, "`router_learning_rate` must be a finite number, 0 or more, got inf"),
        ({"attention_learning_rate": -1e-4}, "`attention_learning_rate` must be a finite number, .*got -0.0001"),
        ({"weight_decay": float("nan")}, "`weight_decay` must be a finite number, 0 or more, got nan"),
        ({"router_loss": float("nan")}, "`router_loss` must be a finite number, 0 or more, got nan"),
        ({"betas": (0.9, 1.0)}, r"`betas` are two decay rates in \[0, 1\).*got \[0.9, 1.0\]"),
        ({"betas": (float("nan"), 0.9)}, r"`betas` are two decay rates in \[0, 1\).*got \[nan, 0.9\]"),
        ({"distillation": float("nan")}, r"`distillation` is the weight .* in \(0, 1\], got nan"),
        ({"warmup_ratio": float("nan")}, "`warmup_ratio` is a share of the steps, between 0 and 1, got nan"),
    ],
)
def test_numbers_that_no_training_can_have_are_refused_at_once(folder, settings, match):
    with pytest.raises(ValueError, match=match):
        RecoveryModule(source=str(folder / "model"), **settings)


def test_the_rate_of_a_plain_module_is_checked_too(folder):
    with pytest.raises(ValueError, match="`learning_rate` must be a finite number, 0 or more, got nan"):
        LanguageModelModule(source=str(folder / "model"), learning_rate=float("nan"))
