"""The command `evaluate`.  N rows, S tokens in a row, T tokens of a text."""

import logging
from pathlib import Path

import torch

from lightning_moe.allocation.budget import check_prune_ratio
from lightning_moe.assets import resolve_asset
from lightning_moe.commands._shared import (
    Device,
    Loaders,
    held_out,
    load_on,
    resolve_device,
    results_folder,
    tokenizer_beside,
)
from lightning_moe.commands._tasks import TaskRequest
from lightning_moe.evaluation.agreement import DenseReference
from lightning_moe.evaluation.stages import Stage, check_stage_name, evaluate_stage, save_stage
from lightning_moe.evaluation.tasks import tasks_table
from lightning_moe.evaluation.windows import SlidingWindows
from lightning_moe.models.loading import DtypeName, read_config
from lightning_moe.training.data import TextDataModule

log = logging.getLogger(__name__)


def evaluate(
    *,
    model: str,
    out: str,
    data: TextDataModule,
    adapter: str | None = None,
    name: str = "evaluated",
    prune_ratio: float | None = None,
    stride: int | None = None,
    reference: str | None = None,
    tasks: list[str] | str | None = None,
    limit: int | None = None,
    seed: int = 0,
    allow_code_execution: bool = False,
    dtype: DtypeName = "float32",
    device: Device = "auto",
) -> None:
    """Loss per validation corpus, bytes on disk, stored and active parameters of a folder, and zero-shot tasks.

    Args:
        model: Folder, `asset:small_moe` or hub name: dense, ragged or packed; a model without experts too.
        out: Folder of results; the row goes to `<out>/stages/<name>.json`.
        data: The data module; its `validation` corpora are used.
        adapter: Folder of a PEFT adapter to load on top.
        name: Name of the row.
        prune_ratio: The ratio the row states; as counted in the folder if not given.
        stride: Slide a window of `data.validation_sequence_length` tokens over each corpus by so many tokens, and
            predict every token once, from at least the rest of the window; null: windows that do not overlap.
        reference: The dense model, for KL and top-1 agreement with it on the same text.
        tasks: Tasks of lm_eval, or presets: `paper_b_six`, `paper_a_general`, `math`, `code`. A list, or names with
            commas.
        limit: Items of each task, drawn by `seed`; null: all.
        seed: Seed of the items and of few-shot examples.
        allow_code_execution: Tasks may run Python programs that the model wrote, with your rights.
        dtype: Type of the unpacked weights; `auto` is the stored one.
        device: Where it runs; `auto` is the GPU if there is one.
    """
    check_stage_name(name)
    if prune_ratio is not None:
        check_prune_ratio(prune_ratio)
    scoring = None
    if tasks is not None:
        asked = TaskRequest(tasks=tasks, limit=limit, seed=seed, allow_code_execution=allow_code_execution)
        scoring = asked.scores(tokenizer_beside(model) or data.tokenizer)
    folder = results_folder(out)
    loaders = held_out(data) if stride is None else sliding(data, stride=stride)
    data.check_vocabulary(vocab_size=int(read_config(model).get_text_config().vocab_size))
    dense = None
    if reference is not None:
        dense = DenseReference.measure(load_on(reference, dtype=dtype, device=device, any_family=True), loaders=loaders)
    row = evaluate_stage(
        name,
        folder=resolve_asset(model),
        adapter=adapter,
        loaders=loaders,
        prune_ratio=prune_ratio,
        seconds=0.0,
        dtype=dtype,
        device=resolve_device(device),
        reference=dense,
        tasks=scoring,
    )
    row |= {"sequence_length": data.sequence_lengths["validation"], "stride": stride}
    save_stage(folder, stage=row)
    _log_row(row, file=folder / "stages" / f"{name}.json")


def _log_row(row: Stage, *, file: Path) -> None:
    log.info("%s", "\n".join(f"{corpus}: {nll:.4f} nats" for corpus, nll in row["nll_per_corpus"].items()))
    if "kl" in row:
        log.info("KL from the dense model: %.4f nats, same top token: %.2f %%", row["kl"], 100 * row["top1_agreement"])
    if "tasks" in row:
        log.info("%s", tasks_table(row["tasks"]))
    windows = f"rows of {row['sequence_length']} tokens" + (f", stride {row['stride']}" if row["stride"] else "")
    size = "" if row["bytes"] is None else f", {row['bytes'] / 1e6:.2f} MB"
    log.info(
        "%s: %.4f nats per token (%s)%s, %s parameters stored, %s active. Written to %s.",
        row["name"],
        row["nll"],
        windows,
        size,
        f"{row['stored_params']:,}",
        f"{row['active_params']:,}",
        file,
    )


def sliding(data: TextDataModule, *, stride: int) -> Loaders:
    """Windows over the validation corpora's whole text.

    Raises:
        ValueError: a corpus of examples, which have no running text; or the stride is refused.
    """
    loaders: dict[str, SlidingWindows] = {}
    for name, rows in data.rows("validation").items():
        if rows.learn_NS is not None:
            raise ValueError(
                f"`stride` slides over running text, and the corpus '{name}' holds examples with prompts. Leave "
                "`stride` out, or give text."
            )
        context = data.sequence_lengths["validation"]
        text_T = rows.input_ids_NS[torch.arange(context) < rows.length_N[:, None]]
        loaders[name] = SlidingWindows(text_T, context=context, stride=stride, batch_size=data.validation_batch_size)
    return loaders
