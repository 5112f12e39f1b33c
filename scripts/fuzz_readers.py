"""Damaged and hostile files at every reader of the library, by the hundred thousand.

    python scripts/fuzz_readers.py --cases 100000 --json fuzz.json

Each case damages a valid sample (bits, structure, headers, numbers, names) and reads it: it must be read or refused
with a message that names file or field; nothing is executed, opened outside the folder, or allocated without bound.
Batches are decided by their number alone: with `--json` an interrupted run goes on, and `--first` takes other ones.
"""

import argparse
import json
import multiprocessing
import os
import re
import tempfile
import time
from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path

from fuzzing.binary_readers import BINARY_READERS
from fuzzing.campaign import Finding, Tally, check_sample, kinds_of, run_batch, silenced
from fuzzing.readers import Reader, Sample
from fuzzing.text_readers import TEXT_READERS
from tqdm import tqdm

BATCH_CASES = 250
_LEAST = 1000
_inherited: dict[str, tuple[Reader, Sample]] = {}  # which no pipe could carry


def main() -> None:
    """Runs the campaign, prints counts and findings, and exits with 1 if there are findings."""
    args = _arguments()
    readers = [reader for reader in (*BINARY_READERS, *TEXT_READERS) if re.search(args.only, reader.name)]
    tallies = _resumed(args.json)
    with tempfile.TemporaryDirectory(prefix="fuzz_samples_") as place:
        with silenced():
            samples = {reader.name: check_sample(reader, folder=Path(place) / reader.name) for reader in readers}
        least = min(_LEAST, args.cases // max(1, len(readers)))
        shares = _shares(readers, samples, total=args.cases, least=least)
        bar = tqdm(total=sum(shares.values()), initial=_done(tallies, shares), unit="case", smoothing=0.02)
        _run(readers, samples, shares=shares, tallies=tallies, bar=bar, args=args)
        bar.close()
    findings = _report(tallies)
    raise SystemExit(1 if findings else 0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000, help="cases of all readers together (default 100000)")
    parser.add_argument("--json", type=Path, help="counts and findings; a run that finds it goes on from it")
    parser.add_argument("--only", default="", help="readers whose name this regular expression finds")
    parser.add_argument("--first", type=int, default=0, help="number of the first batch of each reader (default 0)")
    parser.add_argument("--keep", type=Path, help="folder for the damaged samples of findings")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, default=cores, help=f"readers at a time (default: cores, {cores})")
    return parser.parse_args()


def _resumed(file: Path | None) -> dict[str, Tally]:
    if file is None or not file.is_file():
        return {}
    content = json.loads(file.read_text(encoding="utf-8"))["readers"]
    for values in content.values():
        values["findings"] = [Finding(**one | {"story": tuple(one["story"])}) for one in values["findings"]]
    return {name: Tally(**values) for name, values in content.items()}


def _shares(readers: list[Reader], samples: dict[str, Sample], *, total: int, least: int) -> dict[str, int]:
    """Cases of each reader: `least` of every one, and the rest by how fast it reads."""
    speed = {}
    for reader in readers:
        began = time.perf_counter()
        run_batch(reader, samples[reader.name], batch=10**9, cases=10)
        speed[reader.name] = 1 / (time.perf_counter() - began)
    rest = max(0, total - least * len(readers))
    exact = {name: least + rest * own / sum(speed.values()) for name, own in speed.items()}
    return {name: -(-int(cases) // 10) * 10 for name, cases in exact.items()}


def _done(tallies: dict[str, Tally], shares: dict[str, int]) -> int:
    return sum(min(shares[name], tally.cases) for name, tally in tallies.items() if name in shares)


def _run(
    readers: list[Reader],
    samples: dict[str, Sample],
    *,
    shares: dict[str, int],
    tallies: dict[str, Tally],
    bar: tqdm,
    args: argparse.Namespace,
) -> None:
    """Batches, one of a reader at a time and `--workers` readers at a time, in processes that are forked here."""
    _inherited.update({reader.name: (reader, samples[reader.name]) for reader in readers})
    waiting = deque(
        reader.name for reader in readers if tallies.setdefault(reader.name, Tally()).cases < shares[reader.name]
    )
    running: dict[Future[Tally], str] = {}
    with ProcessPoolExecutor(args.workers, mp_context=multiprocessing.get_context("fork")) as pool:
        while waiting or running:
            while waiting and len(running) < args.workers:
                name = waiting.popleft()
                batch, cases = args.first + tallies[name].batches, min(BATCH_CASES, shares[name] - tallies[name].cases)
                running[pool.submit(_run_inherited, name, batch, cases, args.keep)] = name
            bar.set_postfix_str(", ".join(running.values()))
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name, done = running.pop(future), future.result()
                tallies[name].add(done)
                bar.update(done.cases)
                if args.json is not None:
                    _write(args.json, tallies)
                if done.cases and tallies[name].cases < shares[name]:
                    waiting.appendleft(name)


def _run_inherited(name: str, batch: int, cases: int, keep: Path | None) -> Tally:
    reader, sample = _inherited[name]
    return run_batch(reader, sample, batch=batch, cases=cases, keep=keep)


def _write(file: Path, tallies: dict[str, Tally]) -> None:
    totals = {name: sum(getattr(tally, name) for tally in tallies.values()) for name in ("cases", "read", "refused")}
    findings = sum(len(tally.findings) for tally in tallies.values())
    content = totals | {"findings": findings, "readers": {name: asdict(tally) for name, tally in tallies.items()}}
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    temporary.replace(file)


def _report(tallies: dict[str, Tally]) -> list[Finding]:
    print(f"{'reader':<28}{'cases':>8}{'read':>8}{'refused':>8}{'same':>6}{'findings':>9}{'ms/case':>9}")
    for name, own in tallies.items():
        speed = 1000 * own.seconds / max(1, own.cases)
        print(
            f"{name:<28}{own.cases:>8}{own.read:>8}{own.refused:>8}{own.unchanged:>6}{len(own.findings):>9}{speed:>9.1f}"
        )
    total = sum(own.cases for own in tallies.values())
    findings = [one for own in tallies.values() for one in own.findings]
    print(f"{total} cases, {len(findings)} findings.")
    for (reader, what, where), count in kinds_of(findings).most_common():
        first = next(
            one for one in findings if (one.reader, one.where) == (reader, where) and one.what.startswith(what)
        )
        print(f"{count:>5} x {reader}: {first.what}\n        at {where}; case {first.case}: {'; '.join(first.story)}")
    return findings


if __name__ == "__main__":
    main()
