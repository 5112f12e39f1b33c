"""Shows that `calibrate`, `plan` and `prune` go through a checkpoint that is larger than memory, and resume.

A checkpoint with Qwen3-30B-A3B's layers (`--layers`, or `--folder` for one that is there) goes through `calibrate`,
`plan`, `prune` to NF4 with repair, `prune` to 16 bit without repair, and `calibrate` of the NF4 folder, each a process
of its own in memory limited to `--limit`, under `/usr/bin/time -v`. Then each is run again, killed (SIGKILL) at a
random moment after a random file of its working folder appeared, and started again; its result must have the digest of
the one that nobody killed.

`peak_GB` is the most memory of the process, `beyond_GB` what is left of it beyond interpreter and libraries (those of
`calibrate --help`), and `layers` that in decoder layers of the source.

    python scripts/prove_streaming.py --work /big/disk/proof --json proof.json

`--quick` uses a tiny shape, where the limit cannot be below the checkpoint's size.
"""

import argparse
import hashlib
import json
import random
import shutil
import signal
import struct
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarking import Settings, environment_of, report
from make_synthetic_checkpoint import read_config, write_checkpoint
from memory_limit import Limit, Run, memory_limit, run_measured
from tqdm import tqdm

from lightning_moe.allocation.units import parse_bytes
from lightning_moe.files import folder_bytes, write_json
from lightning_moe.progress import hidden

CORPORA = ("speeches", "code")
LIBRARIES = 1.5e9  # what the default limit leaves to everything but two layers
ATTEMPTS = 5  # to kill a command before it is done
TINY: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 4096,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 192,
    "norm_topk_prob": True,
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One command of the proof.

    Args:
        name: in the table.
        words: after `python -m lightning_moe`, without `--out`.
        out: what it writes.
    """

    name: str
    words: tuple[str, ...]
    out: Path


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where and how the commands run.

    Args:
        work: folder of the results.
        limit: how their memory is limited.
        random: draws where they are killed.
        kills: how often each is killed.
        program: what the words of a job follow.
    """

    work: Path
    limit: Limit
    random: random.Random
    kills: int
    program: tuple[str, ...] = (sys.executable, "-m", "lightning_moe")

    def run(self, words: Sequence[str], *, out: Path, stop: Callable[[], bool] = lambda: False) -> Run:
        """Runs one command; its output is in a log beside the results."""
        command = [*self.program, *words, "--out", str(out)]
        log = self.work / f"{out.name}.log"
        return run_measured(command, limit=self.limit, log=log, stop=stop)


def jobs_of(folder: Path, *, work: Path, data: Path) -> list[Job]:
    """The five commands; the last one reads what the third wrote."""
    statistics, plan, packed = work / "statistics.safetensors", work / "plan.json", work / "pruned_nf4"
    again = work / "statistics_nf4.safetensors"
    texts = ("--config", str(data))
    cut = ("prune", *texts, "--model", str(folder), "--plan", str(plan))
    return [
        Job(name="calibrate", words=("calibrate", *texts, "--model", str(folder)), out=statistics),
        Job(name="plan", words=("plan", "--statistics", str(statistics), "--prune_ratio", "0.5"), out=plan),
        Job(name="prune, NF4, repair", words=(*cut, "--quantize", "nf4", "--repair", "true"), out=packed),
        Job(name="prune, 16 bit", words=(*cut, "--quantize", "none", "--repair", "false"), out=work / "pruned_16bit"),
        Job(name="calibrate, NF4", words=("calibrate", *texts, "--model", str(packed)), out=again),
    ]


def working_folder(out: Path) -> Path:
    """Where a command keeps what it has so far."""
    return out.with_name(f"{out.name}.partial")


def finished_files(out: Path) -> set[str]:
    """Names of the whole files in a command's working folder."""
    folder = working_folder(out)
    files = [file for file in folder.rglob("*") if file.is_file()] if folder.is_dir() else []
    return {str(file.relative_to(folder)) for file in files if not file.name.startswith(".")}


def digest(path: Path) -> str:
    """SHA-256 over the bytes of a file, or over names and bytes of a folder's files."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    whole = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            own = hashlib.file_digest(opened, "sha256").hexdigest()
        whole.update(f"{file.relative_to(path)}|{own}\n".encode())
    return whole.hexdigest()


def prove(job: Job, place: Place) -> dict[str, Any]:
    """Runs a command alone, then killed and started again; returns what was seen."""
    for path in (job.out, working_folder(job.out)):
        remove(path)
    seen: dict[str, float] = {}

    def note_files() -> bool:
        for name in sorted(finished_files(job.out) - set(seen)):
            seen[name] = time.monotonic()
        return False

    whole = place.run(job.words, out=job.out, stop=note_files)
    check(whole, job, place)
    row = {"peak": whole.peak, "seconds": whole.seconds, "digest": digest(job.out)}
    row |= {"command": job.name, "bytes": folder_bytes(job.out), "files": list(seen)}
    if seen and place.kills:
        pause = (max(seen.values()) - min(seen.values())) / len(seen)
        row |= interrupted(job, place, files=list(seen), pause=pause)
    return row


def interrupted(job: Job, place: Place, *, files: Sequence[str], pause: float) -> dict[str, Any]:
    """Makes the result again with kills in between, up to `pause` seconds after one of `files`; returns what it saw."""
    killed_at: list[str] = []
    seconds: list[float] = []
    for _ in range(ATTEMPTS):
        if killed_at and not job.out.exists():
            break  # else it was done before it could be killed
        remove(job.out)
        remove(working_folder(job.out))
        chosen = sorted(place.random.sample(range(len(files)), min(place.kills, len(files))))
        runs = [run_until(job, place, file=files[index], pause=place.random.uniform(0, pause)) for index in chosen]
        killed_at = [files[index] for index, run in zip(chosen, runs, strict=True) if run.code]
        seconds = [run.seconds for run in runs]
    last = place.run(job.words, out=job.out)
    check(last, job, place)
    seconds.append(last.seconds)
    left = working_folder(job.out).exists()
    again = {"seconds_with_kills": seconds, "digest_with_kills": digest(job.out), "working_folder_left": left}
    return {"killed_at": killed_at, **again}


def run_until(job: Job, place: Place, *, file: str, pause: float) -> Run:
    """Runs a command and kills it `pause` seconds after a file was seen in its working folder."""
    deadline: list[float] = []

    def stop() -> bool:
        if not deadline and file in finished_files(job.out):
            deadline.append(time.monotonic() + pause)
        return bool(deadline) and time.monotonic() >= deadline[0]

    run = place.run(job.words, out=job.out, stop=stop)
    if run.code != -signal.SIGKILL:
        check(run, job, place)
    return run


def remove(path: Path) -> None:
    """Removes a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check(run: Run, job: Job, place: Place) -> None:
    """Ends the proof where a command failed."""
    if run.code:
        tail = "\n".join(run.output.splitlines()[-15:])
        raise SystemExit(f"{job.name} ended with code {run.code} (137: out of memory). {place.limit.how}.\n{tail}")


def decoder_layer_bytes(folder: Path) -> int:
    """Bytes of the largest decoder layer as it is stored, from the headers of the files."""
    layers: dict[str, int] = {}
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            header = json.loads(opened.read(struct.unpack("<Q", opened.read(8))[0]))
        for name, entry in header.items():
            if ".layers." in name:
                start, end = entry["data_offsets"]
                index = name.split(".layers.", 1)[1].split(".", 1)[0]
                layers[index] = layers.get(index, 0) + end - start
    return max(layers.values())


def write_data_config(path: Path, *, folder: Path, tokens: int) -> None:
    """The shipped text, with the checkpoint's tokenizer."""
    texts = {
        name: {"source": f"asset:text/{name}/calibration.jsonl", "max_tokens": tokens // len(CORPORA)}
        for name in CORPORA
    }
    data = {"tokenizer": str(folder), "sequence_length": 256, "calibration_batch_size": 4, "calibration": texts}
    write_json(path, {"data": data})


def row_of(result: Mapping[str, Any], *, libraries: int, layer_bytes: int) -> dict[str, object]:
    """The table's row."""
    beyond = result["peak"] - libraries
    again = result.get("seconds_with_kills", []) if result.get("killed_at") else []
    same = result.get("digest_with_kills") == result["digest"] if again else None
    return {
        "command": result["command"],
        "peak_GB": f"{result['peak'] / 1e9:.2f}",
        "beyond_GB": f"{beyond / 1e9:.2f}",
        "layers": f"{beyond / layer_bytes:.2f}",
        "seconds": f"{result['seconds']:.0f}",
        "killed_at": ", ".join(result.get("killed_at", [])) or "-",
        "seconds_killed_and_resumed": " + ".join(f"{value:.0f}" for value in again) or "-",
        "resumed_identical": "-" if same is None else "yes" if same else "NO",
        "written_GB": f"{result['bytes'] / 1e9:.2f}",
    }


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for checkpoint and results (they stay), on a large disk"
    )
    parser.add_argument("--folder", type=Path, help="a sharded checkpoint that is there (default: make one)")
    parser.add_argument("--layers", type=int, default=7, help="of the checkpoint that is made")
    parser.add_argument("--limit", type=parse_bytes, help="memory, such as 4GB (default: two layers and 1.5 GB)")
    parser.add_argument("--tokens", type=int, default=4096, help="of calibration text")
    parser.add_argument("--kills", type=int, default=1, help="how often each command is killed")
    parser.add_argument("--only", nargs="*", help="names of the commands in the table to run (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="draws where commands are killed")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    parser.add_argument("--quick", action="store_true", help="a tiny shape, under a minute")
    return parser.parse_args()


def source_folder(args: argparse.Namespace) -> Path:
    """The checkpoint; made where none was named."""
    if args.folder is not None:
        return args.folder
    folder = args.work / "checkpoint"
    if not folder.exists():
        file = None
        if args.quick:
            file = args.work / "config.json"
            write_json(file, TINY)
        config = read_config(file, num_layers=None if args.quick else args.layers)
        shard_bytes = 5e5 if args.quick else 4e9
        write_checkpoint(folder, config=config, dtype=torch.bfloat16, fp8=False, seed=0, shard_bytes=shard_bytes)
    return folder


def finish(
    args: argparse.Namespace, *, facts: Mapping[str, int], results: Sequence[Mapping[str, Any]], how: str
) -> None:
    """Prints the table and writes the JSON; an error where a result differs or a working folder is left."""
    settings = Settings(json=None, quick=args.quick, threads=1)
    layer_bytes = facts["layer_bytes"]
    beyond = {result["command"]: result["peak"] - facts["libraries_bytes"] for result in results}
    below = "" if facts["limit_bytes"] < facts["checkpoint_bytes"] else ", NOT below the checkpoint"
    note = (
        f"Checkpoint {facts['checkpoint_bytes'] / 1e9:.2f} GB, one decoder layer {layer_bytes / 1e9:.3f} GB; memory "
        f"limited to {facts['limit_bytes'] / 1e9:.2f} GB ({how}){below}; {args.tokens} tokens of calibration text; "
        f"interpreter and libraries {facts['libraries_bytes'] / 1e9:.2f} GB."
    )
    report(
        settings=settings,
        title="Streaming",
        rows=[row_of(result, libraries=facts["libraries_bytes"], layer_bytes=layer_bytes) for result in results],
        ratios={f"beyond_over_two_layers: {name}": value / (2 * layer_bytes) for name, value in beyond.items()},
        notes=[note, ""],
    )
    if args.json is not None:
        write_json(
            args.json, {**facts, "limited_by": how, "commands": results, "environment": environment_of(settings)}
        )
    wrong = [r["command"] for r in results if r.get("digest_with_kills", r["digest"]) != r["digest"]]
    left = [result["command"] for result in results if result.get("working_folder_left")]
    if wrong or left:
        raise SystemExit(f"Other results after a kill: {wrong}; working folder left behind: {left}.")


def main() -> None:
    """Runs the proof."""
    args = read_arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    folder = source_folder(args)
    layer_bytes = decoder_layer_bytes(folder)
    facts = {
        "checkpoint_bytes": folder_bytes(folder),
        "layer_bytes": layer_bytes,
        "limit_bytes": args.limit or int(2 * layer_bytes + LIBRARIES),
        "tokens": args.tokens,
    }
    data = args.work / "data.json"
    write_data_config(data, folder=folder, tokens=args.tokens)
    jobs = [job for job in jobs_of(folder, work=args.work, data=data) if not args.only or job.name in args.only]
    with memory_limit(facts["limit_bytes"]) as limit:
        place = Place(work=args.work, limit=limit, random=random.Random(args.seed), kills=args.kills)
        facts["libraries_bytes"] = run_measured(
            [*place.program, "calibrate", "--help"], limit=limit, log=args.work / "help.log"
        ).peak
        results = [prove(job, place) for job in tqdm(jobs, desc="commands", disable=hidden(progress=True))]
    finish(args, facts=facts, results=results, how=limit.how)


if __name__ == "__main__":
    main()
