"""What each way to recover the shipped small MoE buys: equal steps, held-out text, each with its control.

50 % cut, repaired, NF4, DoRA rank 2, 350 steps of 1,024 tokens (configs/quickstart.yaml). A control is the unpruned
model in NF4 given the same training. Rows that exist are skipped.

    python scripts/recovery_variants.py                                   # all: about an hour on one core
    python scripts/recovery_variants.py --only next_token top_8 --no-controls
    python scripts/recovery_variants.py --table                           # only the table of the rows that exist
"""

import argparse
import csv
import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_moe.evaluation.stages import load_stages, save_stage
from lightning_moe.files import write_json
from lightning_moe.reporting.table import Column, format_markdown

_ROOT = Path(__file__).parents[1]
_LOG = logging.getLogger("recovery_variants")
_NO_TEACHER = {"model.teacher": "null"}
_NO_ATTENTION = {"recovery.adapter.attention_rank": "0"}
_SLOW = {
    "model.expert_learning_rate": "1e-3",
    "model.router_learning_rate": "1e-4",
    "model.attention_learning_rate": "5e-4",
}


def corpora(role: str, *, max_tokens: int) -> str:
    """The corpora of all domains, as the command line takes them."""
    sources = {name: f"asset:text/{name}/{role}.jsonl" for name in ("speeches", "glosses", "code", "math", "manual")}
    return json.dumps({name: {"source": source, "max_tokens": max_tokens} for name, source in sources.items()})


_LITTLE_DATA = _NO_TEACHER | _SLOW | {"data.train": corpora("recovery", max_tokens=8192)}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to recover.

    Args:
        what: the words of the table.
        flags: what differs from configs/quickstart.yaml.
        top_k: tokens a position of the logits on disk; None: none are used.
        stops_early: on the loss of the calibration text, so that the held-out text only measures.
    """

    what: str
    flags: Mapping[str, str]
    top_k: int | None = None
    stops_early: bool = False


VARIANTS = {
    "teacher_16bit": Variant(what="distillation, 16-bit teacher", flags={}),
    "next_token": Variant(what="next-token loss alone", flags=_NO_TEACHER),
    "half_half": Variant(what="both losses, half and half", flags={"model.distillation": "0.5"}),
    "no_attention": Variant(what="16-bit teacher, no attention adapters", flags=_NO_ATTENTION),
    "teacher_nf4": Variant(what="distillation, NF4 teacher", flags={"model.teacher_quantize": "nf4"}),
    "top_8": Variant(what="distillation, 8 logits on disk", flags=_NO_TEACHER, top_k=8),
    "top_64": Variant(what="distillation, 64 logits on disk", flags=_NO_TEACHER, top_k=64),
    "router_loss": Variant(what="16-bit teacher, router loss 0.001", flags={"model.router_loss": "0.001"}),
    "router_loss_large": Variant(what="16-bit teacher, router loss 0.01", flags={"model.router_loss": "0.01"}),
    "next_token_slow": Variant(what="next-token loss alone, rates x 0.1", flags=_NO_TEACHER | _SLOW),
    "next_token_stopped": Variant(what="next-token loss alone, early stopping", flags=_NO_TEACHER, stops_early=True),
    "little_data": Variant(what="next-token loss, rates x 0.1, 41 k tokens 9 times", flags=_LITTLE_DATA),
    "little_data_stopped": Variant(what="... with early stopping", flags=_LITTLE_DATA, stops_early=True),
}


def main() -> None:
    """Reads the command line, makes the rows that are missing, writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/recovery_variants"), help="folder of results")
    parser.add_argument("--steps", type=int, default=350, help="optimizer steps of each run (default: 350)")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="variants to run")
    parser.add_argument("--controls", action=argparse.BooleanOptionalAction, default=True, help="run the controls too")
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    if not options.table:
        bench = Bench(out=options.out, steps=options.steps)
        bench.one_shot()
        for is_control in (False, True) if options.controls else (False,):
            for name in options.only:
                bench.recover(name, is_control=is_control)
    write_table(options.out)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Runs the command line, one process a row, each with its own log.

    Args:
        out: folder of results.
        steps: optimizer steps of each run.
    """

    out: Path
    steps: int

    def one_shot(self) -> None:
        """Statistics, shared by every run, and the rows before any training."""
        statistics = self.out / "statistics.safetensors"
        if not statistics.exists():
            self._run("calibrate", log="calibrate", config=["quickstart_calibrate.yaml"], out=statistics)
        if not self._row("cut_50_nf4").exists():
            stages = "[{name: dense_nf4, prune_ratio: 0.0, bits: 4}, {name: cut_50_nf4, prune_ratio: 0.5, bits: 4}]"
            flags = {"stages": stages, "statistics": statistics, "out": self.out}
            self._run("compare", log="compare", config=["quickstart_compare.yaml"], **flags)

    def recover(self, name: str, *, is_control: bool) -> None:
        """One row: cut (nothing, for a control), pack, train, export, evaluate."""
        row, variant = f"{name}_control" if is_control else name, VARIANTS[name]
        if self._row(row).exists():
            return
        flags: dict[str, Any] = {
            "calibration.file": self.out / "statistics.safetensors",
            "pruning.prune_ratio": 0.0 if is_control else 0.5,
            "export.folder": self.out / "exports" / row,
            "report.folder": self.out,
            "report.name": row,
            "trainer.max_steps": self.steps,
        }
        if variant.top_k is not None:
            flags["model.teacher_logits"] = self._teach(variant.top_k)
        if not variant.stops_early:
            self._run("fit", log=row, config=["quickstart.yaml"], **flags, **variant.flags)
            return
        flags |= self._selection(row)
        self._run("fit", log=row, config=["quickstart.yaml", "early_stopping.yaml"], **flags, **variant.flags)
        self._measure(row)

    def _selection(self, row: str) -> dict[str, Any]:
        """Validates on calibration text, with a checkpoint folder and a row of its own."""
        return {
            "data.validation": corpora("calibration", max_tokens=12800),
            "report.name": f"{row}.selection",
            "trainer.default_root_dir": self.out / "checkpoints" / row,
        }

    def _measure(self, row: str) -> None:
        """The held-out loss of an exported adapter, as a row."""
        adapter = self.out / "exports" / row / "adapter"
        flags = {"model": adapter / "base", "adapter": adapter / "adapter", "out": self.out, "name": row}
        flags |= {"data.tokenizer": "asset:small_moe", "data.sequence_length": 256}
        flags |= {"data.validation": corpora("heldout", max_tokens=12800)}
        self._run("evaluate", log=f"{row}_held_out", config=[], **flags)
        selection = load_stages(self.out)[f"{row}.selection"]
        measured = load_stages(self.out)[row]
        save_stage(self.out, stage=measured | {key: selection[key] for key in ("steps", "seconds")})

    def _teach(self, k: int) -> Path:
        """The folder of the teacher's logits, made where it is not there."""
        folder = self.out / f"teacher_top_{k}"
        self._run("teach", log=folder.name, config=["quickstart_teach.yaml"], k=k, out=folder)
        return folder

    def _row(self, name: str) -> Path:
        return self.out / "stages" / f"{name}.json"

    def _run(self, command: str, *, log: str, config: Sequence[str], **flags: Any) -> None:
        arguments = [part for file in config for part in ("--config", str(_ROOT / "configs" / file))]
        arguments += [part for name, value in flags.items() for part in (f"--{name}", str(value))]
        file = self.out / "logs" / f"{log}.log"
        file.parent.mkdir(parents=True, exist_ok=True)
        _LOG.info("%s %s, log in %s", command, log, file)
        with file.open("w", encoding="utf-8") as output:
            subprocess.run(
                [sys.executable, "-m", "lightning_moe", command, *arguments],
                check=True,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONPATH": str(_ROOT)},
            )


def write_table(out: Path) -> None:
    """`table.csv`, `table.json` and a markdown table on standard output."""
    stages = load_stages(out)
    rows = [_table_row(name, stages=stages) for name in VARIANTS if name in stages]
    before = {name: round(stages[name]["nll"], 4) for name in ("dense", "dense_nf4", "cut_50_nf4") if name in stages}
    write_json(out / "table.json", {"before": before, "rows": rows})
    with (out / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else ["variant"])
        writer.writeheader()
        writer.writerows(rows)
    sys.stdout.write(", ".join(f"{name} {nll:.4f}" for name, nll in before.items()) + "\n\n")
    if rows:
        columns = [Column(key=key, header=key, left=index == 0) for index, key in enumerate(rows[0])]
        sys.stdout.write(format_markdown(rows, columns=columns) + "\n")
    missing = [name for variant in VARIANTS for name in (variant, f"{variant}_control") if name not in stages]
    sys.stdout.write(f"\nNot run: {', '.join(missing) or 'none'}\n")


def _table_row(name: str, *, stages: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Losses in nats; *closed* is the share of the way from the cut model to the control, in percent.

    *closed without adaptation* holds each side against its own untrained model: what training teaches an unpruned
    model too cancels.
    """
    row, control = stages[name], stages.get(f"{name}_control")
    cut, dense = stages["cut_50_nf4"]["nll"], stages["dense_nf4"]["nll"]
    shares = ("", "")
    if control is not None:
        after = row["nll"] - control["nll"]
        shares = tuple(f"{100 * (1 - after / (cut - before)):.1f}" for before in (control["nll"], dense))
    return {
        "variant": VARIANTS[name].what,
        "steps": row["steps"],
        "nll": f"{row['nll']:.4f}",
        "control": "" if control is None else f"{control['nll']:.4f}",
        "% closed": shares[0],
        "% closed without adaptation": shares[1],
        "seconds": round(row["seconds"]),
    }


if __name__ == "__main__":
    main()
