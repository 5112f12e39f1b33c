"""LightningModules of other people, each with a habit of its own."""

import torch
from lightning import LightningModule
from tiny_models import tiny_model
from tiny_runs import ForeignModule
from torch import nn

from lightning_moe.models.discovery import find_language_model, moe_layers
from lightning_moe.training.checkpoint import restore_structure


class TwoOptimizers(ForeignModule):
    """Manual optimization: SGD for the experts, AdamW for the rest, accumulation over two batches, own clipping."""

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self.automatic_optimization = False
        self.norms = []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss / 2)
        if batch_idx % 2 == 0:
            return
        self.norms.append(float(nn.utils.clip_grad_norm_(self.lm.parameters(), 0.5)))
        for optimizer, scheduler in zip(self.optimizers(), self.lr_schedulers(), strict=True):
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()

    def configure_optimizers(self):
        experts = [p for name, p in self.lm.named_parameters() if ".experts." in name]
        rest = [p for name, p in self.lm.named_parameters() if ".experts." not in name]
        optimizers = [torch.optim.SGD(experts, lr=1e-2, momentum=0.9), torch.optim.AdamW(rest, lr=1e-3)]
        return optimizers, [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5) for optimizer in optimizers]


class BuiltLate(ForeignModule):
    """Builds its model in `configure_model`, which Lightning calls more than once."""

    def __init__(self):
        LightningModule.__init__(self)
        self.losses, self.seen, self.num_built = [], [], 0
        self.lm = None

    def configure_model(self):
        if self.lm is None:
            self.num_built += 1
            self.lm = tiny_model().train()


class Agent(LightningModule):
    """Keeps its model three attributes deep, beside modules of its own that are trained too."""

    def __init__(self):
        super().__init__()
        self.agent = nn.ModuleDict({"policy": nn.Module(), "critic": nn.Linear(64, 1)})
        self.agent["policy"].lm = tiny_model().train()
        self.losses = []

    def training_step(self, batch, batch_idx):
        output = self.agent["policy"].lm(**batch, output_hidden_states=True)
        value = self.agent["critic"](output.hidden_states[-1]).square().mean()
        self.losses.append(output.loss.item())
        return output.loss + 0.1 * value

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class PartlyFrozen(ForeignModule):
    """Trains only the parameters whose name contains one of `trained`; all others are frozen, or merely left out."""

    def __init__(self, *, trained, freeze):
        super().__init__()
        self.trained = trained
        if freeze:
            for name, parameter in self.lm.named_parameters():
                parameter.requires_grad_(self.is_trained(name))

    def is_trained(self, name):
        return any(part in name for part in self.trained)

    def configure_optimizers(self):
        chosen = [p for name, p in self.lm.named_parameters() if self.is_trained(name)]
        return torch.optim.AdamW(chosen, lr=1e-2)


class TupleBatches(ForeignModule):
    """Its batches are (ids, mask)."""

    def training_step(self, batch, batch_idx):
        ids, mask = batch
        return self.lm(input_ids=ids, attention_mask=mask, labels=ids).loss


class Reloadable(ForeignModule):
    """Its one line for `load_from_checkpoint` of a run that was cut."""

    def on_load_checkpoint(self, checkpoint):
        restore_structure(checkpoint, model=self.lm)


class Compiled(ForeignModule):
    """Holds what `torch.compile` returns."""

    def __init__(self):
        super().__init__()
        self.lm = torch.compile(self.lm, backend="eager")


def channels(module):
    """Channels of all experts of the model in a module, counted on the weights themselves."""
    layers = moe_layers(find_language_model(module))
    return sum(len(layer.experts.gate_proj.weight) for layer in layers)


def num_hooks(module):
    """Module hooks of every kind."""
    kinds = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_load_state_dict_pre_hooks",
        "_state_dict_hooks",
    )
    return sum(len(getattr(part, kind)) for part in module.modules() for kind in kinds)
