"""The stages as commands: each reads the files the stage before wrote, and can be run alone."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_moe.adapters.storage import load_adapter
from lightning_moe.allocation import build_method
from lightning_moe.allocation.budget import resolve_prune_ratio
from lightning_moe.assets import resolve_asset
from lightning_moe.calibration.collector import collect_statistics
from lightning_moe.evaluation.compare import StageSpec, compare_stages
from lightning_moe.evaluation.stages import evaluate_stage, save_stage
from lightning_moe.evaluation.summary import summarise
from lightning_moe.export.deploy import ExportFormat, check_formats, check_targets, export_model
from lightning_moe.export.huggingface import check_replaceable, save_ragged
from lightning_moe.files import write_json
from lightning_moe.models.loading import DtypeName, can_stream, load_model, read_config
from lightning_moe.quantization.linears import quantize_model
from lightning_moe.quantization.nf4 import check_hidden_size
from lightning_moe.records import CalibrationStatistics, PrunePlan
from lightning_moe.reporting.report import write_report
from lightning_moe.reporting.table import summary_table
from lightning_moe.surgery.cut import apply_plan, convert_experts
from lightning_moe.surgery.repair import plan_repair
from lightning_moe.surgery.streaming import quantize_folder
from lightning_moe.training.data import TextDataModule
from lightning_moe.training.distillation import TeacherQuantize, load_teacher
from lightning_moe.training.teach import make_manifest, prepare_folder, write_teacher_logits
from lightning_moe.training.teacher_logits import LogProbDtype
from lightning_moe.training.tokenization import load_tokenizer

log = logging.getLogger(__name__)
Loaders = Mapping[str, Iterable[Mapping[str, Tensor]]]
Device = Literal["auto", "cpu", "cuda"]


def calibrate(
    *,
    model: str,
    out: str,
    data: TextDataModule,
    dtype: DtypeName = "auto",
    moments: bool = True,
    device: Device = "auto",
) -> None:
    """One forward pass over the calibration corpora: every statistic that any method needs, in one file.

    Args:
        model: Folder, `asset:small_moe` or hub name of the model.
        out: File to write (safetensors).
        data: The data module; its `calibration` corpora are used.
        dtype: Type of the weights during the pass.
        moments: Also gather the [E, H] and [E, E] sums that some expert criteria want.
        device: Where it runs; `auto` is the GPU if there is one.
    """
    loaded = _load(model, dtype=dtype, device=device)
    statistics = collect_statistics(loaded, loaders=data.calibration_dataloaders(), moments=moments)
    statistics.save(out)
    log.info("Statistics of corpora %s written to %s.", list(statistics.corpora), out)


def plan(
    *,
    statistics: str,
    out: str,
    prune_ratio: float | None = None,
    keep_ratio: float | None = None,
    method: str = "exact_global",
    method_args: dict[str, Any] | None = None,
    corpora: list[str] | None = None,
) -> None:
    """Decide which channels stay; reads a statistics file, writes a plan (JSON), needs no model.

    Args:
        statistics: File written by `calibrate`.
        out: Plan to write.
        prune_ratio: Share of routed-expert channels to remove, in [0, 1). Exactly one of this and `keep_ratio`.
        keep_ratio: Share that stays, in (0, 1]: 1 - `prune_ratio`.
        method: `exact_global` (ours), `paper_a`, `uniform` or `reap`.
        method_args: Settings of the method, for example `{align: 64}`.
        corpora: Corpora that count; all of the file if not given.
    """
    ratio = resolve_prune_ratio(prune_ratio=prune_ratio, keep_ratio=keep_ratio)
    made = build_method(method, **(method_args or {})).plan(
        CalibrationStatistics.load(statistics), prune_ratio=ratio, corpora=corpora
    )
    made.save(out)
    log.info("%s\nPlan written to %s.", made.summary(), out)


def prune(
    *,
    model: str,
    plan: str,
    out: str,
    data: TextDataModule,
    quantize: Literal["nf4", "none"] = "nf4",
    repair: bool = True,
    repair_memory_gb: float = 4.0,
    dtype: DtypeName = "auto",
    device: Device = "auto",
) -> None:
    """Cut a model by a plan, repair it, pack it, and write a folder that stock `from_pretrained` loads.

    Without repair, a stock model goes to NF4 layer by layer: memory for the packed model and one layer is enough.

    Args:
        model: Folder, `asset:small_moe` or hub name of the model the plan was made for.
        plan: File written by `plan`.
        out: Folder to write.
        data: The data module; its `calibration` corpora are used by the repair.
        quantize: `nf4`, or `none` for a ragged folder in the model's own type.
        repair: Refit the down projections by least squares (a second calibration pass).
        repair_memory_gb: Memory for the Gram matrices; more passes where it does not suffice.
        dtype: Type of the weights.
        device: Where it runs; `auto` is the GPU if there is one. Packing layer by layer runs on the CPU.
    """
    decided = PrunePlan.load(plan)
    check_replaceable(out)
    wants_repair = repair and decided.num_kept < decided.shape.num_channels
    if quantize == "nf4" and not wants_repair and can_stream(model):
        loaded = quantize_folder(model, plan=decided, dtype=dtype)
    else:
        loaded = _load(model, dtype=dtype, device=device)
        if quantize == "nf4":
            check_hidden_size(decided.shape.hidden_size)
        refit = None
        if wants_repair:
            loaders = data.calibration_dataloaders()
            refit = plan_repair(loaded, plan=decided, loaders=loaders, memory_gb=repair_memory_gb)
        apply_plan(loaded, plan=decided, repair=refit)
        if quantize == "nf4":
            quantize_model(loaded)
    save_ragged(loaded, out)
    data.tokenizer.save_pretrained(out)
    log.info("Pruned model written to %s.", out)


def evaluate(
    *,
    model: str,
    out: str,
    data: TextDataModule,
    adapter: str | None = None,
    name: str = "evaluated",
    prune_ratio: float | None = None,
    dtype: DtypeName = "float32",
    device: Device = "auto",
) -> None:
    """Loss and perplexity per validation corpus, bytes on disk, stored and active parameters of a folder.

    Args:
        model: Folder, `asset:small_moe` or hub name: dense, ragged or packed.
        out: Folder of results; the row goes to `<out>/stages/<name>.json`.
        data: The data module; its `validation` corpora are used.
        adapter: Folder of a PEFT adapter to load on top.
        name: Name of the row.
        prune_ratio: The ratio the row states; as counted in the folder if not given.
        dtype: Type of the unpacked weights.
        device: Where it runs; `auto` is the GPU if there is one.
    """
    row = evaluate_stage(
        name,
        folder=resolve_asset(model),
        adapter=adapter,
        loaders=_held_out(data),
        prune_ratio=prune_ratio,
        seconds=0.0,
        dtype=dtype,
        device=_device(device),
    )
    save_stage(out, stage=row)
    log.info("%s", "\n".join(f"{corpus}: {nll:.4f} nats" for corpus, nll in row["nll_per_corpus"].items()))
    file = Path(out) / "stages" / f"{name}.json"
    log.info("%s: %.4f nats per token, written to %s.", name, row["nll"], file)


def compare(
    *,
    model: str,
    statistics: str,
    out: str,
    stages: list[StageSpec],
    data: TextDataModule,
    dtype: DtypeName = "float32",
    device: Device = "auto",
) -> None:
    """Methods and ratios side by side: each is cut, saved, reloaded and evaluated on held-out text.

    Args:
        model: Folder, `asset:small_moe` or hub name of the dense model.
        statistics: File written by `calibrate`.
        out: Folder of results.
        stages: Rows to make; those of the same cut must follow each other to share it.
        data: The data module; `calibration` for the repair, `validation` to evaluate.
        dtype: Type of the weights while they are cut and evaluated.
        device: Where it runs; `auto` is the GPU if there is one.
    """
    held_out = _held_out(data)
    compare_stages(
        model,
        stages=stages,
        statistics=CalibrationStatistics.load(statistics),
        calibration=data.calibration_dataloaders(),
        held_out=held_out,
        out=out,
        dtype=dtype,
        device=_device(device),
    )


def teach(
    *,
    model: str,
    out: str,
    data: TextDataModule,
    k: int = 64,
    quantize: TeacherQuantize = "none",
    log_prob_dtype: LogProbDtype = "float16",
    dtype: DtypeName = "auto",
    device: Device = "auto",
) -> None:
    """Run the unpruned model over the training rows and keep its likeliest next tokens, to distil from disk.

    `fit --model.teacher_logits OUT` then needs no teacher in memory. Started again, it goes on after the last whole
    shard. Bytes: rows x tokens in a row x k x 4 (6 where the vocabulary is larger than 32,768).

    Args:
        model: Folder, `asset:small_moe` or hub name of the unpruned model.
        out: Folder to write.
        data: The data module; its `train` corpora and sequence length must be those of the later `fit`.
        k: Tokens kept of each position; the probability of all others is one number.
        quantize: `nf4` packs the teacher as it is loaded; `none` takes it as it is stored.
        log_prob_dtype: Stored type of the log-probabilities.
        dtype: Type of the teacher's unpacked weights.
        device: Where it runs; `auto` is the GPU if there is one.
    """
    rows = data.rows("train")
    vocab_size = int(read_config(model).get_text_config().vocab_size)
    manifest = make_manifest(
        rows, teacher=model, quantize=quantize, vocab_size=vocab_size, k=k, log_prob_dtype=log_prob_dtype
    )
    prepare_folder(out, manifest=manifest)
    teacher = load_teacher(model, quantize=quantize, dtype=dtype)
    teacher.to(_device(device))  # pyright: ignore[reportArgumentType]: transformers wraps `to` without its types
    write_teacher_logits(teacher, rows=rows, manifest=manifest, folder=out, batch_size=data.batch_size)


def export(
    *, model: str, out: str, formats: list[ExportFormat], adapter: str | None = None, dtype: DtypeName = "auto"
) -> None:
    """Write a pruned folder in other formats; each is reloaded and its logits compared.

    `[nf4]` alone packs a stock model layer by layer: memory for the packed model and one layer is enough.

    Args:
        model: A pruned folder (or the dense model, to convert it).
        out: Folder of the exports, one subfolder each.
        formats: `adapter`, `merged`, `merged_nf4` (all of a model and its adapter), `ragged` and `padded` (16 bit),
            `stock` (an uncut model), `nf4` (packed; stands last).
        adapter: Folder of the PEFT adapter of that model, for the first three.
        dtype: Type of the unpacked weights.
    """
    check_targets(out, formats=check_formats(formats))
    stream = can_stream(model) and list(formats) == ["nf4"] and adapter is None
    tokenizer = _tokenizer_of(model)
    loaded = quantize_folder(model, dtype=dtype) if stream else load_model(model, dtype=dtype)
    peft_model = None
    if adapter is not None:
        convert_experts(loaded)
        peft_model = load_adapter(loaded, folder=adapter)
    results = export_model(loaded, folder=out, formats=formats, peft_model=peft_model, tokenizer=tokenizer)
    write_json(Path(out) / "exports.json", [result.to_dict() for result in results])
    for result in results:
        log.info("%s: %s", result.format, result.describe())


def report(*, folder: str, control: str = "control", statistics: str | None = None) -> None:
    """Gather the rows of `compare`, `evaluate` and `fit` into summary.json, a table and an HTML page.

    Args:
        folder: Folder of results that the other commands wrote into.
        control: Name of the row that is the unpruned model given the same recovery.
        statistics: Statistics file, for the figures.
    """
    summary = summarise(folder, control=control)
    write_json(Path(folder) / "summary.json", summary)
    plans = {file.stem: PrunePlan.load(file) for file in sorted(Path(folder).glob("plans/*.json"))}
    loaded = None if statistics is None else CalibrationStatistics.load(statistics)
    page = write_report(
        Path(folder) / "report", title="Compression report", summary=summary, plans=plans, statistics=loaded
    )
    log.info("%s\n\nSummary: %s\nReport: %s", summary_table(summary), Path(folder) / "summary.json", page)


def _device(device: Device) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def _load(model: str, *, dtype: DtypeName, device: Device) -> PreTrainedModel:
    """The model on a device."""
    loaded = load_model(model, dtype=dtype)
    return loaded.to(_device(device))  # pyright: ignore[reportArgumentType]: transformers wraps `to` without its types


def _tokenizer_of(model: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a model; a folder may have none."""
    folder = Path(resolve_asset(model))
    if folder.is_dir() and not any(folder.glob("tokenizer*")):
        return None
    return load_tokenizer(model)


def _held_out(data: TextDataModule) -> Loaders:
    return dict(zip(data.validation_names, data.val_dataloader(), strict=True))


_ALL = (calibrate, plan, prune, teach, evaluate, compare, export, report)
COMMANDS = {command.__name__: command for command in _ALL}
