"""No more memory: from the start and on the way; and processes that the kernel ends for it."""

import os
import resource
import signal
from functools import partial
from pathlib import Path

from faults.cases import Case, CaseFolder, Outcome, completed, disturbed, either, place, refused, shares
from faults.places import at_place
from faults.processes import Ended
from faults.stages import STAGES
from torch.utils.data import get_worker_info
from torch.utils.data._utils import fetch

_PAGE = os.sysconf("SC_PAGE_SIZE")


def no_more_memory(*_: object, spare_mb: int = 0) -> None:
    """The process keeps what it has and gets this much more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * _PAGE + spare_mb * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _short(spare_mb: int, share: float | None, folder: CaseFolder) -> Outcome:
    limit = partial(no_more_memory, spare_mb=spare_mb)
    child = limit if share is None else at_place(place(folder, share), limit)
    return disturbed(folder, expects=either(refused("memory"), aborted, completed), child=child)


def aborted(ended: Ended) -> str | None:
    """A library in C++ or Rust gave up: it says that memory is short, and ends the process."""
    told = any(words in ended.output for words in ("memory allocation of", "bad_alloc", "out of memory"))
    if ended.code == -signal.SIGABRT and told and "Traceback" not in ended.output:
        return None
    return f"ended with code {ended.code}: {ended.last_line[:200]}"


def _kill_loader() -> None:
    """In the process that loads data, SIGKILL at its second batch: what the kernel does when memory runs out."""
    original, count = fetch._MapDatasetFetcher.fetch, 0

    def killed(self: fetch._MapDatasetFetcher, index: object) -> object:
        nonlocal count
        count += 1
        if get_worker_info() is not None and count == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, index)

    fetch._MapDatasetFetcher.fetch = killed


def _loader_killed(folder: CaseFolder) -> Outcome:
    arguments = [*folder.stage.arguments, "--data.num_workers", "1", "--data.batch_size", "1"]
    if folder.stage.name != "recover":
        arguments += ["--data.calibration_batch_size", "1"]
    return disturbed(folder, expects=refused("loads data"), arguments=arguments, child=_kill_loader)


def _cases() -> list[Case]:
    made = []
    for stage in STAGES:
        for spare_mb in (0, 4, 16, 64):
            run = partial(_short, spare_mb, None)
            name = f"{spare_mb} MB left"
            made.append(Case(name=name, stage=stage, fault="out of memory", quick=spare_mb in (0, 16), run=run))
        for share, _ in shares(2, 8):
            run = partial(_short, 0, share)
            made.append(Case(name=f"at {share:.3f}", stage=stage, fault="out of memory", quick=False, run=run))
    loading = ("calibrate", "recover")
    made += [Case(name="second batch", stage=stage, fault="killed loader", run=_loader_killed) for stage in loading]
    return made


CASES: list[Case] = _cases()
