"""Cuts during the training of a LightningModule that knows nothing of pruning, with a plain `lightning.Trainer`.

    python scripts/examples/lightning_loop.py [--manual] [--experts] [--steps 60] [--folder runs/lightning_loop]

`Finetuning` is somebody's own module: a transformers MoE as an attribute, all its weights trained, AdamW with two
groups and a schedule of its own; with `--manual` it accumulates, clips and steps by itself. Two callbacks,
which the README shows, cut its experts while it trains; with `--experts` whole experts leave first. The same run
without them stands beside it in the table. The cut model is saved, and loaded again by transformers' own
`from_pretrained`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer, seed_everything
from shipped import command_line, held_out_loss, show, size_of, small_moe, text_batches
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from callbacks import ChannelPruning, ExpertCalibration, ExpertPruning
from lightning_moe.export.huggingface import save_ragged


class Finetuning(LightningModule):
    """Somebody's own module."""

    def __init__(self, *, manual: bool, steps: int) -> None:
        super().__init__()
        self.lm = small_moe()
        self.automatic_optimization = not manual
        self.steps = steps

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.lm(**batch).loss
        if not self.automatic_optimization:
            self.manual_backward(loss / 2)
            if batch_idx % 2:  # every second batch
                optimizer = self.optimizers()
                self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
                optimizer.step()
                optimizer.zero_grad()
                self.lr_schedulers().step()
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        matrices = [weight for weight in self.lm.parameters() if weight.dim() > 1]
        vectors = [weight for weight in self.lm.parameters() if weight.dim() < 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=1e-4)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class HeldOut(Callback):
    """Somebody's own callback: held-out loss as these steps begin, under the name of one column."""

    def __init__(self, column: str, *, rows: dict[int, dict[str, Any]], batches: list[dict[str, Tensor]]) -> None:
        self.column, self.rows, self.batches = column, rows, batches

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        row = self.rows.get(trainer.global_step)
        if row is not None and self.column not in row:
            row[self.column] = held_out_loss(pl_module.lm, self.batches)
            row |= size_of(pl_module.lm) if self.column != "unpruned" else {}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.column != "after":
            self.on_train_batch_start(trainer, pl_module, None, 0)


def fit(callbacks: Sequence[Callback], *, manual: bool, steps: int) -> Finetuning:
    """One run of the loop."""
    seed_everything(0, verbose=False)
    module = Finetuning(manual=manual, steps=steps)
    trainer = Trainer(
        callbacks=list(callbacks),
        max_steps=steps,
        accelerator="cpu",
        accumulate_grad_batches=1 if manual else 2,
        gradient_clip_val=None if manual else 1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches = text_batches("recovery", count=2 * steps, size=4)
    trainer.fit(module, train_dataloaders=DataLoader(batches, batch_size=None))
    return module


def main(arguments: Sequence[str] | None = None) -> tuple[list[dict[str, Any]], Finetuning]:
    parser = command_line(__doc__, folder="runs/lightning_loop")
    parser.add_argument("--manual", action="store_true", help="manual optimization")
    parser.add_argument("--experts", action="store_true", help="the first cut removes whole experts")
    options = parser.parse_args(arguments)
    first, second = options.steps // 4, options.steps // 2
    rows: dict[int, dict[str, Any]] = {step: {"step": step} for step in (first, second, options.steps)}
    held_out = text_batches("heldout", count=8)
    watch = {name: HeldOut(name, rows=rows, batches=held_out) for name in ("unpruned", "before", "after")}
    pruning = [
        ExpertCalibration(num_batches=8),  # of the training batches, run through the model as it is at each cut
        ChannelPruning(schedule=[(first, 0.25), (second, 0.5)]),  # step, share of all channels gone from then on
    ]
    if options.experts:
        pruning[1:] = [ExpertPruning(schedule=[(first, 0.25)]), ChannelPruning(schedule=[(second, 0.5)])]
    fit([watch["unpruned"]], manual=options.manual, steps=options.steps)
    module = fit([watch["before"], *pruning, watch["after"]], manual=options.manual, steps=options.steps)
    show(list(rows.values()))
    save_ragged(module.lm, options.folder)
    reloaded = AutoModelForCausalLM.from_pretrained(options.folder)
    print(f"Saved, and loaded again from {options.folder}: held-out loss {held_out_loss(reloaded, held_out):.4f}.")
    return list(rows.values()), module


if __name__ == "__main__":
    main()
