"""Runs cases of one reader in batches, each in a child process: what kills the process is a finding too."""

import json
import logging
import os
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fuzzing.guard import Outcome, guarded
from fuzzing.mutations import DamagedSample, damaged
from fuzzing.readers import Reader, Sample
from hypothesis import HealthCheck, Phase, given, seed, settings

_CONFIGS = ("config.json", "tokenizer_config.json")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What broke the invariant in one case.

    Args:
        reader: name of the reader.
        case: `BATCH:NUMBER`; the same batch gives the same cases again.
        story: what was done to the sample.
        what: what happened.
        where: the place in our code.
    """

    reader: str
    case: str
    story: tuple[str, ...]
    what: str
    where: str


@dataclass(kw_only=True)
class Tally:
    """Counts of one reader."""

    batches: int = 0
    cases: int = 0
    read: int = 0
    refused: int = 0
    unchanged: int = 0
    seconds: float = 0.0
    findings: list[Finding] = field(default_factory=list)

    def add(self, other: "Tally") -> None:
        """Takes in another one's counts."""
        for name in ("batches", "cases", "read", "refused", "unchanged", "seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.findings += other.findings


def check_sample(reader: Reader, *, folder: Path) -> Sample:
    """The reader's sample, which must be readable under the guard.

    Raises:
        RuntimeError: it is not.
    """
    sample = Sample.of(reader, folder=folder)
    for _ in range(2):  # what is imported or cached at the first reading is not held against it
        outcome = guarded(reader.read, folder, refusals=reader.refusals)
    if outcome.kind != "read":
        raise RuntimeError(f"The valid sample of reader {reader.name} is not read: {outcome}.")
    return sample


def lay_bait(place: Path, sample: Sample) -> None:
    """Puts a valid file where names that lead out of the sample point to: who follows one opens it, which is seen."""
    name = min(sample.files, key=lambda name: (not name.endswith(".safetensors"), name))
    (place / "outside").write_bytes(sample.files[name])


def judge(reader: Reader, case: DamagedSample, *, folder: Path) -> Outcome:
    """Writes one damaged sample and reads it."""
    case.write(folder)
    for name in case.files:
        if Path(name).name in _CONFIGS and (folder / name).exists():  # code that a config may ask for
            (folder / name).with_name("evil.py").write_text("class Evil:\n    pass\n")
    return guarded(reader.read, folder, refusals=reader.refusals)


def run_batch(reader: Reader, sample: Sample, *, batch: int, cases: int, keep: Path | None = None) -> Tally:
    """`cases` cases, which `batch` alone decides, in a child process.

    Args:
        reader: what reads.
        sample: its valid sample.
        batch: seed.
        cases: how many.
        keep: where the damaged samples of findings are kept.
    """
    with tempfile.TemporaryDirectory(prefix="fuzz_") as place:
        report = Path(place) / "report.jsonl"
        child = os.fork()
        if child == 0:
            _be_child(reader, sample, batch=batch, cases=cases, place=Path(place), keep=keep)
        _, status = os.waitpid(child, 0)
        tally = _tally(report, reader=reader)
        if status != 0:
            how = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"exit {status >> 8}"
            last = (Path(place) / "current").read_text() if (Path(place) / "current").exists() else "before the first"
            tally.findings.append(
                Finding(reader=reader.name, case=f"{batch}", story=(last,), what=f"the process died of {how}", where="")
            )
        return tally


def _be_child(reader: Reader, sample: Sample, *, batch: int, cases: int, place: Path, keep: Path | None) -> None:
    """Runs in the forked process and never returns."""
    code = 1
    try:
        with silenced():
            _run_cases(reader, sample, batch=batch, cases=cases, place=place, keep=keep)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _run_cases(reader: Reader, sample: Sample, *, batch: int, cases: int, place: Path, keep: Path | None) -> None:
    number = 0
    lay_bait(place, sample)
    with (place / "report.jsonl").open("w", encoding="utf-8") as report:

        @seed(batch)
        @settings(
            max_examples=cases,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(damaged(sample))
        def one(case: DamagedSample) -> None:
            nonlocal number
            number += 1
            (place / "current").write_text(f"{number}: {'; '.join(case.story)}")
            began = time.perf_counter()
            outcome = judge(reader, case, folder=place / "sample")
            row: dict[str, Any] = {"kind": outcome.kind, "seconds": time.perf_counter() - began}
            row["unchanged"] = case.files == sample.files and not case.odd
            if outcome.kind == "finding":
                name = f"{batch}:{number}"
                row["finding"] = asdict(
                    Finding(reader=reader.name, case=name, story=case.story, what=outcome.what, where=outcome.where)
                )
                if keep is not None:
                    shutil.copytree(
                        place / "sample",
                        keep / reader.name / name,
                        symlinks=True,
                        ignore=_ignore_odd,
                        dirs_exist_ok=True,
                    )
            report.write(json.dumps(row) + "\n")
            report.flush()

        one()


def _ignore_odd(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if not (Path(folder) / name).is_file() and not (Path(folder) / name).is_dir()]


def _tally(report: Path, *, reader: Reader) -> Tally:
    tally = Tally(batches=1)
    for line in report.read_text(encoding="utf-8").splitlines() if report.is_file() else []:
        row = json.loads(line)
        tally.cases += 1
        tally.read += row["kind"] == "read"
        tally.refused += row["kind"] == "refused"
        tally.unchanged += row["unchanged"]
        tally.seconds += row["seconds"]
        if "finding" in row:
            tally.findings.append(Finding(**row["finding"] | {"story": tuple(row["finding"]["story"])}))
    return tally


def kinds_of(findings: list[Finding]) -> Counter[tuple[str, str, str]]:
    """How often each kind of finding came: reader, the first words of what happened, place."""
    return Counter((one.reader, one.what.split(":")[0][:80], one.where) for one in findings)


@contextmanager
def silenced() -> Iterator[None]:
    """Without the logs and bars that thousands of refusals would print."""
    logging.disable(logging.CRITICAL)
    os.environ["TQDM_DISABLE"] = "1"
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        os.environ.pop("TQDM_DISABLE")
