"""NaN and infinity in a LightningModule of somebody else's, under our callbacks."""

import pytest
import torch
from foreign_modules import TwoOptimizers
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_runs import ForeignModule, loader_of, quiet_trainer, token_batches

from callbacks import ChannelPruning, ExpertCalibration, ExpertPruning, Recovery
from lightning_moe.adapters.inject import AdapterConfig
from lightning_moe.training.checkpoint import restore_structure
from lightning_moe.training.finite import check_gradients

pytestmark = pytest.mark.fault

SETTINGS = {"method_args": {"align": 16}}
RECOVERY = {"adapter": AdapterConfig(expert_rank=2, router_rank=2)}


class Broken(ForeignModule):
    """Its fourth loss is multiplied by `factor`."""

    def __init__(self, *, factor):
        super().__init__()
        self.factor = factor

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.trainer.global_step != 3:
            return loss
        self.before = {name: value.detach().clone() for name, value in self.named_parameters()}
        return loss * self.factor

    def on_load_checkpoint(self, checkpoint):
        restore_structure(checkpoint, model=self.lm)


class BrokenWeights(ForeignModule):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if batch_idx == 2:
            with torch.no_grad():
                self.lm.lm_head.weight[0, 0] = float("inf")


class BrokenManual(TwoOptimizers):
    def training_step(self, batch, batch_idx):
        if batch_idx == 2:
            self.lm.lm_head.weight.register_hook(lambda gradient: gradient * float("nan"))
        super().training_step(batch, batch_idx)


def scheduled(kind):
    return [ExpertCalibration(num_batches=2), kind(schedule=[[2, 0.25]])]


CALLBACKS = {
    "one cut": lambda: [ExpertCalibration(num_batches=2), ChannelPruning(prune_ratio=0.5, **SETTINGS)],
    "scheduled channels": lambda: [ExpertCalibration(num_batches=2), ChannelPruning(schedule=[[2, 0.5]], **SETTINGS)],
    "scheduled experts": lambda: scheduled(ExpertPruning),
    "recovery": lambda: [Recovery(**RECOVERY)],
}


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
@pytest.mark.parametrize("callbacks", CALLBACKS)
def test_a_run_stops_before_the_step_and_goes_on_from_its_checkpoint(tmp_path, callbacks, factor):
    module, keep = Broken(factor=factor), {"dirpath": tmp_path, "every_n_train_steps": 1, "save_top_k": -1}
    settings = {"max_steps": 5, "enable_checkpointing": True, "deterministic": True}
    with pytest.raises(ValueError, match=r"Step 4: NaN or infinity in the gradients of \d+ of \d+ tensors, first of"):
        quiet_trainer([*CALLBACKS[callbacks](), ModelCheckpoint(**keep)], **settings).fit(
            module, loader_of(token_batches())
        )
    after = dict(module.named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in module.before.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"epoch=0-step={step}.ckpt" for step in (1, 2, 3)]

    again = Broken(factor=1.0)
    trainer = quiet_trainer([*CALLBACKS[callbacks](), ModelCheckpoint(**keep)], **settings)
    trainer.fit(again, loader_of(token_batches()), ckpt_path=str(tmp_path / "epoch=0-step=3.ckpt"))
    assert trainer.global_step == 5


def test_weights_that_are_infinite_are_not_saved(tmp_path):
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
    trainer = quiet_trainer([*CALLBACKS["one cut"](), keep], max_steps=5, enable_checkpointing=True)
    with pytest.raises(ValueError, match=r"After step 3: the weights 'lm\.lm_head\.weight' are not finite"):
        trainer.fit(BrokenWeights(), loader_of(token_batches()))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"epoch=0-step={step}.ckpt" for step in (1, 2)]


def test_manual_optimization_stops_before_any_of_its_optimizers_steps():
    module = BrokenManual()
    with pytest.raises(ValueError, match=r"Step 3: NaN or infinity in the gradients of .* first of 'lm"):
        quiet_trainer(scheduled(ExpertPruning), max_steps=8).fit(module, loader_of(token_batches()))
    assert all(value.isfinite().all() for value in module.parameters())
    assert module.trainer.optimizers[0].state  # it had stepped before


def test_a_scaler_leaves_its_steps_out_by_itself():
    """Under `16-mixed` nothing is looked at: Lightning's scaler skips a step whose gradients are infinite."""
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.tensor([1.0, float("inf")])
    module = ForeignModule()
    module._trainer = type("Scaled", (), {"precision": "16-mixed"})()
    check_gradients(module, optimizer=torch.optim.SGD([weight], lr=0.1))
