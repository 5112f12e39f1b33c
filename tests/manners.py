"""What the tests of callback manners share: modules with every loop, and each callback in a list that works."""

import torch
from lightning import Callback
from tiny_runs import ForeignModule

from callbacks import ChannelPruning, ExpertCalibration, ExpertPruning, Recovery, RouterMonitor
from lightning_moe.models.discovery import moe_layers

NUM_CHANNELS = 2 * 8 * 32


class Everyone(ForeignModule):
    """Somebody's module with every loop; trains what is trainable and logs a validation loss."""

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("val_loss", self.lm(**batch).loss)

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.lm(**batch).loss)

    def predict_step(self, batch, batch_idx):
        return self.lm(input_ids=batch["input_ids"]).logits

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW([p for p in self.lm.parameters() if p.requires_grad], lr=1e-3)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def one_shot():
    return [ExpertCalibration(num_batches=1), ChannelPruning(prune_ratio=0.5)]


def scheduled():
    return [ExpertCalibration(num_batches=1), ChannelPruning(schedule=[(1, 0.25), (2, 0.5)])]


def experts():
    return [ExpertCalibration(num_batches=1), ExpertPruning(schedule=[(1, 0.25), (2, 0.5)])]


def recovered():
    return [*one_shot(), Recovery()]


def scheduled_recovery():
    return [*scheduled(), Recovery()]


def monitored():
    return [*scheduled(), RouterMonitor(every_n_steps=1)]


VARIANTS = {make.__name__: make for make in (one_shot, scheduled, experts, recovered, scheduled_recovery, monitored)}
IN_TRAINING = ("scheduled", "experts", "scheduled_recovery", "monitored")


class Widths(Callback):
    """Channels of the model when each batch begins, after every cut: put it last."""

    def __init__(self):
        self.seen = []
        self.optimizers = set()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(num_channels(pl_module.lm))
        self.optimizers.update(id(optimizer) for optimizer in trainer.optimizers)


def num_channels(model):
    return sum(sum(layer.base_experts.widths) for layer in moe_layers(model))


def hooks_in(module):
    """Hooks on modules and overridden forwards of MoE blocks, apart from those that PEFT and transformers keep."""
    layers = moe_layers(module.lm)
    parts = [module, module.lm, module.lm.base_model]
    parts += [part for layer in layers for part in (*layer.block.modules(), layer.decoder_layer)]
    hooks = [part for part in parts if part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part)]
    return len(hooks) + len(module._load_state_dict_pre_hooks)


def is_consistent(module, trainer):
    """Every trainable parameter is in the optimizer, nothing else is, and its moments have its shape."""
    (optimizer,) = trainer.optimizers
    held = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    assert held.keys() == {id(p) for p in module.lm.parameters() if p.requires_grad}
    assert {id(p) for p in optimizer.state} <= held.keys()
    assert all(state["exp_avg"].shape == p.shape for p, state in optimizer.state.items())
    assert not any(p.is_inference() for p in module.lm.parameters())
    assert all(p.isfinite().all() for p in held.values())
