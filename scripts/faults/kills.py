"""SIGKILL and SIGTERM: right before each change on the disk, in the middle of a file, and from outside at any time."""

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

from faults.cases import Case, CaseFolder, Outcome, completed, disturbed, either, killed, place, refused, shares
from faults.places import at_place
from faults.stages import STAGES

# Places of a long campaign, more than any stage has; and of a short one.
_MANY = {"calibrate": 70, "plan": 6, "prune": 110, "quantise": 70, "pack": 90, "recover": 140, "export": 170}
_FEW = {"calibrate": 5, "plan": 3, "prune": 6, "quantise": 4, "pack": 5, "recover": 5, "export": 5}


def _kill(torn: bool, event: str, arguments: Any) -> None:
    """SIGKILL to this process; where a file was about to get its name, half of it has been written."""
    if torn and event == "os.rename" and Path(arguments[0]).is_file():
        with Path(arguments[0]).open("r+b") as file:
            file.truncate(os.path.getsize(arguments[0]) // 2)
    os.kill(os.getpid(), signal.SIGKILL)


def _terminate(event: str, arguments: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _killed_at(share: float, folder: CaseFolder, *, torn: bool) -> Outcome:
    # Without an older output there are fewer places than in the run that was counted.
    ending = killed if torn else either(killed, completed)
    return disturbed(folder, expects=ending, child=at_place(place(folder, share), partial(_kill, torn)))


def _terminated_at(share: float, folder: CaseFolder) -> Outcome:
    stopped = refused("terminated", codes=(143,))
    return disturbed(folder, expects=either(stopped, completed), child=at_place(place(folder, share), _terminate))


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
