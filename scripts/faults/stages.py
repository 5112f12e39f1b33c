"""The stages of a job on a tiny model, each with what it reads and writes, and their undisturbed runs."""

import json
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from faults.places import listing
from faults.processes import command, start_function
from faults.snapshots import copy
from tqdm import tqdm
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from lightning_moe.assets import asset_path

_DATA = ("--config", "data.yaml")
_ALIGN = ("--method_args", "{align: 8}")
_PLAN = ("plan", "--statistics", "out/statistics.safetensors")
_PRUNE = ("prune", *_DATA, "--model", "model", "--plan", "out/plan.json")
_ROWS = tuple(f"out/report/stages/job{name}.json" for name in ("", "_merged", ".exports"))
_ADAPTED = ("--model", "out/recovered/adapter/base", "--adapter", "out/recovered/adapter/adapter")
# All folders have names of one length: manifests name the source in full, and their bytes are counted.
_NAME_LENGTH = 16
_LIMIT_S = 1200.0  # for an undisturbed run, however slow the machine


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One command of the job.

    Args:
        name: of the stage.
        arguments: the command, with paths relative to its folder.
        inputs: files and folders that it reads.
        outputs: files and folders that it writes, under their final names.
        other: options that make another, equally good output: the older one that stands where the new one goes.
        resumes: options of the second run.
        keeps: what else may appear under its own name, for a run that goes on.
    """

    name: str
    arguments: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    other: tuple[str, ...]
    resumes: tuple[str, ...] = ()
    keeps: tuple[str, ...] = ()

    @property
    def again(self) -> tuple[str, ...]:
        """The command of the second run."""
        return (*self.arguments, *self.resumes)


_STAGES = (
    Stage(
        name="calibrate",
        arguments=("calibrate", *_DATA, "--model", "model", "--out", "out/statistics.safetensors"),
        inputs=("model", "text", "data.yaml"),
        outputs=("out/statistics.safetensors",),
        other=("--moments", "false"),
    ),
    Stage(
        name="plan",
        arguments=(*_PLAN, *_ALIGN, "--prune_ratio", "0.5", "--out", "out/plan.json"),
        inputs=("out/statistics.safetensors",),
        outputs=("out/plan.json",),
        other=("--prune_ratio", "0.25"),
    ),
    Stage(
        name="prune",
        arguments=(*_PRUNE, "--quantize", "none", "--out", "out/pruned"),
        inputs=("model", "text", "data.yaml", "out/plan.json"),
        outputs=("out/pruned",),
        other=("--repair", "false"),
    ),
    Stage(
        name="quantise",
        arguments=(*_PRUNE, "--quantize", "nf4", "--repair", "false", "--out", "out/packed"),
        inputs=("model", "text", "data.yaml", "out/plan.json"),
        outputs=("out/packed",),
        other=("--quantize", "none"),
    ),
    Stage(
        name="pack",
        arguments=("export", "--model", "model", "--out", "out/exports", "--formats", "[nf4]"),
        inputs=("model",),
        outputs=("out/exports/nf4", "out/exports/exports.json"),
        other=("--dtype", "bfloat16"),
    ),
    Stage(
        name="recover",
        arguments=("fit", *_DATA, "--config", "fit.yaml"),
        inputs=("model", "text", "data.yaml", "fit.yaml"),
        outputs=("out/recovered/adapter", "out/recovered/merged_nf4", *_ROWS),
        other=("--pruning.prune_ratio", "0.25"),
        resumes=("--ckpt_path", "last"),
        keeps=("out/report", "out/checkpoints"),
    ),
    Stage(
        name="export",
        arguments=("export", *_ADAPTED, "--out", "out/exports", "--formats", "[merged, merged_nf4, ragged]"),
        inputs=("out/recovered/adapter",),
        outputs=tuple(f"out/exports/{name}" for name in ("merged", "merged_nf4", "ragged", "exports.json")),
        other=("--dtype", "bfloat16"),
    ),
)
STAGES: Mapping[str, Stage] = {stage.name: stage for stage in _STAGES}


@dataclass(frozen=True, kw_only=True)
class Baselines:
    """Undisturbed runs of the stages, each in a folder of its own.

    Args:
        root: where they are.
    """

    root: Path

    def folder(self, stage: str) -> Path:
        """Inputs and outputs of an undisturbed run."""
        return self.root / f"{stage:_<{_NAME_LENGTH}}"

    def older(self, stage: str) -> Path:
        """The same with the stage's other options."""
        return self.root / f"{f'{stage}_older':_<{_NAME_LENGTH}}"

    def case_folder(self, number: int) -> Path:
        """Where a case is run."""
        return self.root / f"{number:_>{_NAME_LENGTH}}"

    def num_places(self, stage: str) -> int:
        """How often an undisturbed run changes something on the disk, see `faults.places`."""
        return len((self.root / f"{stage}.places").read_text().splitlines())

    def seconds(self, stage: str) -> float:
        """How long an undisturbed run takes."""
        return float((self.root / f"{stage}.seconds").read_text())

    def new_folder(self, path: Path, *, stage: Stage, older: bool) -> None:
        """Copies the inputs to a case's folder, and older outputs to where the new ones go."""
        (path / "out").mkdir(parents=True)
        for name in stage.inputs:
            copy(self.older(stage.name) / name, path / name)
        for name in stage.outputs if older else ():
            copy(self.older(stage.name) / name, path / name)


def make_baselines(root: Path, *, shipped: bool, wanted: Collection[str] = STAGES) -> Baselines:
    """Makes the model and the text, and runs every stage without a fault, over an older output.

    Args:
        root: an empty folder.
        shipped: with the shipped small model instead of a tiny one of random weights.
        wanted: names of the stages that are needed; those before them are run too.

    Raises:
        RuntimeError: a stage does not even run undisturbed.
    """
    baselines, job = Baselines(root=root), root / "job"
    job.mkdir(parents=True)
    _finish(start_function(lambda: write_inputs(job, shipped=shipped), folder=job).end(limit_s=_LIMIT_S), name="inputs")
    last = max(list(STAGES).index(name) for name in wanted)
    for stage in tqdm(_STAGES[: last + 1], desc="Undisturbed runs", leave=False):
        _make(baselines, stage=stage, job=job)
        for name in stage.outputs:
            copy(baselines.folder(stage.name) / name, job / name)
    return baselines


def _make(baselines: Baselines, *, stage: Stage, job: Path) -> None:
    """One stage, first with its other options, then over what these gave."""
    older, folder = baselines.older(stage.name), baselines.folder(stage.name)
    (older / "out").mkdir(parents=True)
    for name in stage.inputs:
        copy(job / name, older / name)
    _finish(command([*stage.arguments, *stage.other], folder=older, limit_s=_LIMIT_S), name=stage.name)
    baselines.new_folder(folder, stage=stage, older=True)
    places, began = baselines.root / f"{stage.name}.places", time.monotonic()
    _finish(command(stage.arguments, folder=folder, child=listing(places), limit_s=_LIMIT_S), name=stage.name)
    (baselines.root / f"{stage.name}.seconds").write_text(str(time.monotonic() - began))


def _finish(ended: Any, *, name: str) -> None:
    if ended.code:
        raise RuntimeError(f"The stage '{name}' fails without any fault, with code {ended.code}:\n{ended.output}")


def write_inputs(folder: Path, *, shipped: bool) -> None:
    """Model, tokenizer, two corpora, and the configs of a job."""
    if shipped:
        copy(Path(asset_path("small_moe")), folder / "model")
    else:
        _tiny_model().save_pretrained(folder / "model")
        for file in Path(asset_path("small_moe")).glob("tokenizer*"):
            copy(file, folder / "model" / file.name)
    (folder / "text").mkdir()
    for name, domain in (("a", "code"), ("b", "glosses")):
        lines = asset_path(f"text/{domain}/recovery.jsonl").read_text(encoding="utf-8").splitlines()[:6]
        rows = [{"text": json.loads(line)["text"][:400]} for line in lines]
        (folder / "text" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "data.yaml").write_text(yaml.safe_dump({"data": _data()}))
    (folder / "fit.yaml").write_text(yaml.safe_dump(_fit()))


def _tiny_model() -> torch.nn.Module:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=4096,
        hidden_size=64,
        intermediate_size=48,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        initializer_range=0.05,
        tie_word_embeddings=False,
        max_position_embeddings=256,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _data() -> dict[str, Any]:
    corpora = {name: {"source": f"text/{name}.jsonl"} for name in ("a", "b")}
    return {
        "tokenizer": "model",
        "sequence_length": 32,
        "batch_size": 4,
        "train": {"a": corpora["a"]},
        "calibration": corpora,
        "validation": corpora,
    }


def _fit() -> dict[str, Any]:
    return {
        "seed_everything": 7,
        "model": _made("lightning_moe.training.module.RecoveryModule", **_MODULE),
        "calibration": _made("callbacks.ExpertCalibration"),
        "pruning": _made("callbacks.ChannelPruning", prune_ratio=0.5, method_args={"align": 8}, repair=True),
        "recovery": _made("callbacks.Recovery", quantize="nf4", adapter=_ADAPTER),
        "export": _made("callbacks.ExportPruned", folder="out/recovered", formats=["adapter", "merged_nf4"]),
        "report": _made("callbacks.CompressionReport", folder="out/report", name="job"),
        "trainer": _TRAINER,
    }


_ADAPTER = {"expert_rank": 2, "router_rank": 2, "attention_rank": 2}
_MODULE: dict[str, Any] = {
    "source": "model",
    "expert_learning_rate": 1e-2,
    "router_learning_rate": 1e-3,
    "gradient_checkpointing": False,
    "schedule": "constant_with_warmup",
    "warmup_ratio": 0.0,
}


def _made(path: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": path, "init_args": arguments}


_TRAINER: dict[str, Any] = {
    "accelerator": "cpu",
    "max_steps": 4,
    "limit_val_batches": 0,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "logger": False,
    "deterministic": True,
    "callbacks": [
        _made(
            "lightning.pytorch.callbacks.ModelCheckpoint",
            dirpath="out/checkpoints",
            filename="{step}",
            every_n_train_steps=1,
            save_last=True,
        )
    ],
}
