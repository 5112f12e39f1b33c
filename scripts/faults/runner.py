"""Runs cases, each in a folder of its own, on all cores; and what came of them."""

import multiprocessing
import shutil
import time
import traceback
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

from faults.cases import Case, CaseFolder, Outcome
from faults.processes import end_with_parent
from faults.stages import STAGES, Baselines
from tqdm import tqdm

_inherited: list[Case] = []


@dataclass(frozen=True, kw_only=True)
class Result:
    """A case and its outcome."""

    case: Case
    outcome: Outcome
    seconds: float

    @property
    def survived(self) -> bool:
        """Nothing was as it should not be."""
        return not self.outcome.problems

    def to_dict(self) -> dict[str, Any]:
        """For the JSON file."""
        about = {"case": self.case.title, "stage": self.case.stage, "fault": self.case.fault}
        return about | {"survived": self.survived, "seconds": round(self.seconds, 2)} | asdict(self.outcome)


def run_cases(cases: Sequence[Case], *, baselines: Baselines, workers: int, keep: bool = False) -> list[Result]:
    """Runs the cases in `workers` forked processes; results in the order of the cases.

    Args:
        cases: what to run; their stages have baselines.
        baselines: undisturbed runs.
        workers: how many at a time.
        keep: leave the folders of lost cases.
    """
    numbers = range(len(cases))
    bar = tqdm(total=len(cases), desc="Cases", smoothing=0.05)
    found: dict[int, Result] = {}
    # Closed, so that an interrupted campaign removes no folder that a worker is still in.
    with closing(_results(cases, baselines=baselines, workers=workers, keep=keep)) as results:
        for number, result in results:
            found[number] = result
            bar.set_postfix(lost=sum(not one.survived for one in found.values()), refresh=False)
            bar.update()
    bar.close()
    return [found[number] for number in numbers]


def _results(
    cases: Sequence[Case], *, baselines: Baselines, workers: int, keep: bool
) -> Generator[tuple[int, Result], None, None]:
    # Every worker is forked before the pool starts its threads, and inherits the cases, which may hold any function.
    _inherited[:] = cases
    fork = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(max_workers=workers, mp_context=fork, initializer=end_with_parent)
    try:
        futures = {pool.submit(_run_inherited, number, baselines, keep): number for number in range(len(cases))}
        for future in as_completed(futures):
            number = futures[future]
            try:
                yield number, Result(case=cases[number], **future.result())
            except BrokenProcessPool:
                broken = Outcome(saw="nothing", problems=("the process that ran the case was ended",))
                yield number, Result(case=cases[number], outcome=broken, seconds=0.0)
    finally:
        pool.shutdown(cancel_futures=True)  # interrupted: what runs ends, the rest is not begun


def _run_inherited(number: int, baselines: Baselines, keep: bool) -> dict[str, Any]:
    return run_case(number, _inherited[number], baselines, keep)


def run_case(number: int, case: Case, baselines: Baselines, keep: bool) -> dict[str, Any]:
    """One case; an error of the campaign itself counts as lost."""
    folder = CaseFolder(path=baselines.case_folder(number), stage=STAGES[case.stage], baselines=baselines)
    began = time.monotonic()
    try:
        baselines.new_folder(folder.path, stage=folder.stage, older=case.older)
        outcome = case.run(folder)
    except Exception:  # to record it
        outcome = Outcome(saw="nothing", problems=(f"the case itself failed: {traceback.format_exc(limit=-3)}",))
    if not (keep and outcome.problems):
        shutil.rmtree(folder.path, ignore_errors=True)
    return {"outcome": outcome, "seconds": time.monotonic() - began}
