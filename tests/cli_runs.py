"""The quickstart's job on a tiny model and text, through the command line."""

from pathlib import Path

import yaml
from tiny_runs import save_model, save_text

from lightning_moe import cli

CONFIGS = Path(__file__).parents[1] / "configs"


def save_job(folder):
    """A model, two corpora, and `data.yaml` that names them."""
    save_text(folder)
    save_model(folder / "model")
    corpora = {name: {"source": str(folder / f"{name}.jsonl")} for name in ("a", "b")}
    data = {
        "tokenizer": "asset:small_moe",
        "sequence_length": 32,
        "batch_size": 8,
        "train": {"a": corpora["a"]},
        "calibration": {"a": corpora["a"] | {"max_tokens": 400}},  # enough for two samples
        "validation": corpora,
    }
    (folder / "data.yaml").write_text(yaml.safe_dump({"data": data}))
    return folder


def run(name, *arguments):
    """One subcommand, in this process."""
    cli.main([name, *map(str, arguments)])


def quickstart(folder, *flags):
    """`fit` with the quickstart's config on the tiny model and text."""
    overlay = {
        "model": {
            "class_path": "lightning_moe.training.module.RecoveryModule",
            "init_args": {"source": str(folder / "model"), "teacher": None},
        },
        "calibration": {"class_path": "callbacks.ExpertCalibration", "init_args": {"file": None}},
        "pruning": {"class_path": "callbacks.ChannelPruning", "init_args": {"method_args": {"align": 8}}},
        "export": {"class_path": "callbacks.ExportPruned", "init_args": {"folder": str(folder / "fit" / "exports")}},
        "report": {"class_path": "callbacks.CompressionReport", "init_args": {"folder": str(folder / "fit")}},
        "trainer": {"max_steps": 2, "enable_progress_bar": False},
    }
    (folder / "overlay.yaml").write_text(yaml.safe_dump(overlay))
    files = (CONFIGS / "quickstart.yaml", folder / "data.yaml", folder / "overlay.yaml")
    run("fit", *(part for file in files for part in ("--config", file)), *flags)
