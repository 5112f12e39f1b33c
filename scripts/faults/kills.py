"""SIGKILL and SIGTERM: right before each change on the disk, in the middle of a file, and from outside at any time."""

import os
import resource
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from faults.cases import Case, CaseFolder, Outcome, completed, disturbed, either, killed, place, refused, shares
from faults.places import at_place, from_place
from faults.processes import Ended
from faults.stages import STAGES

# Places of a long campaign, more than any stage has; and of a short one.
_MANY = {"calibrate": 70, "plan": 6, "prune": 110, "quantise": 70, "pack": 90, "recover": 140, "export": 170}
_FEW = {"calibrate": 5, "plan": 6, "prune": 6, "quantise": 4, "pack": 5, "recover": 5, "export": 5}


# A file that is being written gets so far.
_TORN_BYTES = 40


def _kill(event: str, arguments: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _killed_in_a_write(number: int, *, last: bool) -> Callable[[], None]:
    """For a child process: from a place on, the first file that is written to ends it after a few bytes.

    Whoever writes it, Python or not, and under whatever name. Where nothing is written up to the next place, the
    process is killed there; and a file that is about to get its name is cut in half first, as if it had got so far.
    """
    passed = last

    def act(event: str, arguments: Any) -> None:
        nonlocal passed
        if event == "os.rename" and Path(arguments[0]).is_file():
            os.truncate(arguments[0], os.path.getsize(arguments[0]) // 2)
            passed = True
        if passed:
            _kill(event, arguments)
        passed = True
        resource.setrlimit(resource.RLIMIT_FSIZE, (_TORN_BYTES, _TORN_BYTES))

    def install() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        from_place(number, act)()

    return install


def _torn(ended: Ended) -> str | None:
    """Killed, by SIGKILL or in a write."""
    return None if ended.code == -signal.SIGXFSZ else killed(ended)


def _terminate(event: str, arguments: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _killed_at(share: float, folder: CaseFolder, *, torn: bool) -> Outcome:
    number = place(folder, share)
    if torn:
        return disturbed(folder, expects=_torn, child=_killed_in_a_write(number, last=share == 1))
    # Without an older output there are fewer places than in the run that was counted.
    return disturbed(folder, expects=either(killed, completed), child=at_place(number, _kill), may_miss=True)


def _terminated_at(share: float, folder: CaseFolder) -> Outcome:
    stopped = refused("terminated", codes=(143,))
    return disturbed(folder, expects=stopped, child=at_place(place(folder, share), _terminate))


def _signalled(signum: int, share: float, folder: CaseFolder) -> Outcome:
    """From outside, so far into the time that the undisturbed run took."""
    after_s = share * folder.baselines.seconds(folder.stage.name)
    ending = killed if signum == signal.SIGKILL else refused("terminated", codes=(143,))
    return disturbed(folder, expects=either(ending, completed), signals=[(after_s, signum)])


def _cases() -> list[Case]:
    made = []
    for stage in STAGES:
        for share, quick in shares(_FEW[stage], _MANY[stage]):
            torn = partial(_killed_at, share, torn=True)
            made.append(Case(name=f"at {share:.3f}, half a file", stage=stage, fault="SIGKILL", quick=quick, run=torn))
            clean = partial(_killed_at, share, torn=False)
            made.append(Case(name=f"at {share:.3f}", stage=stage, fault="SIGKILL", quick=False, older=False, run=clean))
        for share, quick in shares(2, 20):
            run = partial(_terminated_at, share)
            made.append(Case(name=f"at {share:.3f}", stage=stage, fault="SIGTERM", quick=quick, run=run))
            for signum in (signal.SIGKILL, signal.SIGTERM):
                run = partial(_signalled, signum, share)
                name = f"from outside at {share:.2f}"
                made.append(Case(name=name, stage=stage, fault=signal.Signals(signum).name, quick=False, run=run))
    return made


CASES: list[Case] = _cases()
