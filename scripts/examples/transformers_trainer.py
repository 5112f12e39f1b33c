"""Cuts during a transformers `Trainer`, through a `TrainerCallback` of ten lines.

    python scripts/examples/transformers_trainer.py [--steps 60] [--folder runs/transformers_trainer]

Gradient accumulation, clipping, the schedule of the learning rate, evaluation and checkpoints are the Trainer's own.
Its checkpoints of a cut model are ordinary model folders: `from_pretrained` loads them after `import lightning_moe`.
A second run goes on from one between the two cuts with `resume_from_checkpoint`; `pruning.pt` beside the Trainer's
own files says what was cut until then. `callbacks/README.md` shows the callback and its use.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from shipped import command_line, held_out_loss, show, size_of, small_moe, text_batches, text_rows
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from lightning_moe.surgery.pruner import ScheduledPruner
from lightning_moe.training.checkpoint import restore_structure, write_structure


class Pruning(TrainerCallback):
    def __init__(self, pruner):
        self.pruner = pruner

    def on_step_begin(self, args, state, control, *, optimizer, **kwargs):
        self.pruner.step(state.global_step, optimizers=[optimizer])

    def on_save(self, args, state, control, *, model, **kwargs):
        saved = {"pruner": self.pruner.state_dict()}
        write_structure(saved, model=model)
        torch.save(saved, f"{args.output_dir}/checkpoint-{state.global_step}/pruning.pt")


class Watched(Pruning):
    """The same with a row of the table at each cut."""

    def __init__(self, pruner: ScheduledPruner, *, rows: list[dict[str, Any]]) -> None:
        super().__init__(pruner)
        self.rows, self.held_out = rows, text_batches("heldout", count=8)

    def on_step_begin(self, args: Any, state: Any, control: Any, *, model: PreTrainedModel, **kwargs: Any) -> None:
        if self.pruner.due(state.global_step) is None:
            return
        row = {"step": state.global_step, "before": held_out_loss(model, self.held_out)}
        super().on_step_begin(args, state, control, **kwargs)
        self.rows.append(row | {"after": held_out_loss(model, self.held_out)} | size_of(model))

    def on_train_end(self, args: Any, state: Any, control: Any, *, model: PreTrainedModel, **kwargs: Any) -> None:
        self.rows.append({"step": state.global_step, "before": held_out_loss(model, self.held_out)} | size_of(model))


def train(*, steps: int, folder: Path, checkpoint: Path | None) -> tuple[PreTrainedModel, list[dict[str, Any]]]:
    """A run of `steps` steps from the shipped model, or one that goes on from a checkpoint of it."""
    rows: list[dict[str, Any]] = []
    schedule = [(steps // 4, 0.25), (steps // 2, 0.5)]
    calibration = text_batches("calibration", count=8)
    model = small_moe()
    saved = torch.load(checkpoint / "pruning.pt", weights_only=True) if checkpoint else {}
    restore_structure(saved, model=model)  # the cuts that are behind us; in a new run there are none
    pruner = ScheduledPruner(model, schedule=schedule, loaders={"text": calibration})
    if saved:
        pruner.load_state_dict(saved["pruner"])
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-4,
        max_grad_norm=1.0,
        eval_strategy="steps",
        eval_steps=max(1, steps // 4),
        save_strategy="steps",
        save_steps=3 * steps // 8,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in text_rows("recovery", count=8 * steps)],
        eval_dataset=[{"input_ids": row, "labels": row} for row in text_rows("validation", count=32)],
        callbacks=[Watched(pruner, rows=rows)],  # `Pruning(pruner)` but for the table
    )
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return model, rows


def main(arguments: Sequence[str] | None = None) -> tuple[list[dict[str, Any]], PreTrainedModel]:
    options = command_line(__doc__, folder="runs/transformers_trainer").parse_args(arguments)
    whole, rows = train(steps=options.steps, folder=options.folder, checkpoint=None)
    show(rows)
    checkpoint = options.folder / f"checkpoint-{3 * options.steps // 8}"
    model, _ = train(steps=options.steps, folder=options.folder, checkpoint=checkpoint)
    expected = whole.state_dict()
    same = all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    print(f"Resumed from {checkpoint}: the weights at the end are {'equal' if same else 'NOT equal'}.")
    reloaded = AutoModelForCausalLM.from_pretrained(checkpoint)
    print(f"{checkpoint} alone: {size_of(reloaded)['channels']:,} channels.")
    return rows, model


if __name__ == "__main__":
    main()
