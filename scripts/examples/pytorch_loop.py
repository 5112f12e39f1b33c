"""Cuts during a plain PyTorch loop, and a checkpoint between them that a second run goes on from.

    python scripts/examples/pytorch_loop.py [--steps 60] [--folder runs/pytorch_loop]

What pruning adds to a loop that exists is what `callbacks/README.md` shows of this one: a pruner before the optimizer,
and one call before each batch. The optimizer stays the same object with the same groups, the moments of what survives
and its schedule. A checkpoint also says what the model looks like and what the pruner did: plain types, read with
`weights_only=True`. The second run starts from it and ends with the weights of the first.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from shipped import command_line, held_out_loss, show, size_of, small_moe, text_batches
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LinearLR
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_moe.surgery.pruner import ScheduledPruner
from lightning_moe.training.checkpoint import restore_structure, write_structure


def train(*, steps: int, file: Path, resume: bool) -> tuple[PreTrainedModel, list[dict[str, Any]]]:
    """A run of `steps` steps from the shipped model that saves at 3/8 of them, or one that goes on from there."""
    schedule, save_at, rows = [(steps // 4, 0.25), (steps // 2, 0.5)], 3 * steps // 8, []
    batches, held_out = text_batches("recovery", count=steps), text_batches("heldout", count=8)
    calibration = text_batches("calibration", count=8)
    checkpoint = torch.load(file, weights_only=True) if resume else {}
    model, first = small_moe(), 0
    restore_structure(checkpoint, model=model)  # first of all: the cuts that are behind us; none in a new run
    pruner = ScheduledPruner(model, schedule=schedule, loaders={"text": calibration})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)  # after the pruner, which takes the experts over
    scheduler = LinearLR(optimizer, start_factor=1.0, end_factor=0.1, total_iters=steps)
    if resume:
        pruner.load_state_dict(checkpoint["pruner"])
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scheduler.load_state_dict(checkpoint["scheduler"])
        first = checkpoint["step"]
    before = None
    for step in range(first, steps):
        plan = pruner.step(step, optimizers=[optimizer])  # before the batch; cuts when a cut is due
        if plan is not None:
            rows.append({"step": step, "before": before, "after": held_out_loss(model, held_out)} | size_of(model))
        loss = model(**batches[step]).loss
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if pruner.due(step + 1) is not None:
            before = held_out_loss(model, held_out)
        if step + 1 == save_at:
            checkpoint = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": save_at}
            checkpoint["scheduler"] = scheduler.state_dict()
            checkpoint["pruner"] = pruner.state_dict()  # whenever you save
            write_structure(checkpoint, model=model)
            torch.save(checkpoint, file)
    rows.append({"step": steps, "before": held_out_loss(model, held_out)} | size_of(model))
    return model, rows


def main(arguments: Sequence[str] | None = None) -> tuple[list[dict[str, Any]], PreTrainedModel]:
    options = command_line(__doc__, folder="runs/pytorch_loop").parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    file = options.folder / "checkpoint.pt"
    whole, rows = train(steps=options.steps, file=file, resume=False)
    show(rows)
    model, _ = train(steps=options.steps, file=file, resume=True)
    expected = whole.state_dict()
    same = all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    print(f"Resumed from {file}: the weights at the end are {'equal' if same else 'NOT equal'}.")
    model.save_pretrained(options.folder / "model")
    reloaded = AutoModelForCausalLM.from_pretrained(options.folder / "model")
    loss = held_out_loss(reloaded, text_batches("heldout", count=8))
    print(f"Saved, and loaded again from {options.folder / 'model'}: held-out loss {loss:.4f}.")
    return rows, model


if __name__ == "__main__":
    main()
