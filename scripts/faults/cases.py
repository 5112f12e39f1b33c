"""A case of the campaign: one stage, one fault, and what has to hold of it.

A case survives when the command ended as expected, left alone what lay there, put nothing half-made under a final name,
and, with the cause out of the way, gives on a second run what an undisturbed run gives.
"""

import re
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from faults.places import was_missed
from faults.processes import LIMIT_S, Ended, command
from faults.snapshots import contents, copy, is_whole, snapshot
from faults.stages import Baselines, Stage

# What a command may leave under other names than the final ones, for the next run.
_WORKING = re.compile(r"\.(partial|unfinished)(/|$)|(^|/)\.")
# A command that takes so many times as long as the undisturbed run is taken for one that never ends.
_SLOWER = 30

Expectation = Callable[[Ended], str | None]
"""What is wrong with the way a process ended; None: nothing."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a case.

    Args:
        saw: what the user saw: exit code and last line.
        left: what the fault left on the disk.
        again: what the second run gave.
        problems: what should not have been; a case without any has survived.
        ended_well: the disturbed command ended with code 0: the fault did not matter to it, or its consequence is told.
    """

    saw: str
    left: str = "nothing new"
    again: str = "not run"
    problems: tuple[str, ...] = ()
    ended_well: bool = False


@dataclass(frozen=True, kw_only=True)
class CaseFolder:
    """A folder of one case, with copies of its stage's inputs, and the outputs of an older run where they would go.

    Args:
        path: working directory of the commands.
        stage: what is run there.
        baselines: undisturbed runs of all stages.
    """

    path: Path
    stage: Stage
    baselines: Baselines

    def undisturbed(self, stage: str | None = None) -> Path:
        """The folder in which a stage (this one if not given) ran without a fault."""
        return self.baselines.folder(self.stage.name if stage is None else stage)

    def command(
        self,
        arguments: Sequence[str],
        *,
        child: Callable[[], None] | None = None,
        signals: Sequence[tuple[float, int]] = (),
    ) -> Ended:
        """Runs a command here, see `faults.processes.command`."""
        return command(arguments, folder=self.path, child=child, signals=signals, limit_s=self.limit_s)

    @property
    def limit_s(self) -> float:
        """What no command here takes, in seconds, on this machine with what else it does."""
        return max(LIMIT_S, _SLOWER * self.baselines.seconds(self.stage.name))

    def restore(self) -> None:
        """Puts back every input as it was before the fault."""
        for name in self.stage.inputs:
            copy(self.undisturbed() / name, self.path / name)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One fault at one stage.

    Args:
        name: short, unique within its stage and fault.
        stage: name of a stage of `faults.stages`.
        fault: what kind of fault, for the table.
        run: does it.
        quick: part of the short campaign.
        older: an older output stands under the final names when the fault strikes.
    """

    name: str
    stage: str
    fault: str
    run: Callable[[CaseFolder], Outcome]
    quick: bool = True
    older: bool = True

    @property
    def title(self) -> str:
        """Names it in tables and for `--only`."""
        return f"{self.stage}/{self.fault}/{self.name}"


def place(folder: CaseFolder, share: float) -> int:
    """The place (`faults.places`) that lies so far into the stage: 0 the first, 1 the last."""
    return round(share * (folder.baselines.num_places(folder.stage.name) - 1))


def shares(few: int, many: int) -> list[tuple[float, bool]]:
    """How far into a stage the `many` cases of a long campaign strike, and which of them are the `few` of the short."""
    quick = {round(index / (few - 1) * (many - 1)) for index in range(few)}
    return [(index / (many - 1), index in quick) for index in range(many)]


def disturbed(
    folder: CaseFolder,
    *,
    expects: Expectation,
    spoil: Callable[[Path], None] | None = None,
    child: Callable[[], None] | None = None,
    signals: Sequence[tuple[float, int]] = (),
    arguments: Sequence[str] | None = None,
    remedy: Callable[[Path], None] | None = None,
    may_differ: bool = False,
    may_miss: bool = False,
    runner: Callable[[], Ended] | None = None,
) -> Outcome:
    """Runs the stage with a fault, looks at what is left, removes the cause, and runs it again.

    Args:
        folder: where.
        expects: how the disturbed run may end: `refused`, `killed`, `completed` or one of yours.
        spoil: damages inputs in the folder first; they are restored before the second run.
        child: called in the process of the disturbed run only.
        signals: sent to it, with the seconds after its start.
        arguments: of the disturbed run, if it is not the stage's own command.
        remedy: removes what else caused the fault.
        runner: runs the disturbed command instead; `arguments`, `child` and `signals` are then its own business.
        may_miss: the place of the fault may not come in this run; otherwise a fault that never struck is no survival.
        may_differ: a disturbed run that ends well may give another output than an undisturbed one (its input differs).
    """
    if spoil is not None:
        spoil(folder.path)
    before = snapshot(folder.path)
    if runner is None:
        given = folder.stage.arguments if arguments is None else arguments
        ended = folder.command(given, child=child, signals=signals)
    else:
        ended = runner()
    problems = [expects(ended), *_problems_left(folder, before=before, ended=ended, may_differ=may_differ)]
    if was_missed(folder.path) and not may_miss:
        problems.append("the fault never struck")
    left = _new_names(folder, before=before)
    if remedy is not None:
        remedy(folder.path)
    folder.restore()
    anew = may_differ and ended.code == 0  # what a run on other input has trained is no place to go on from
    for name in folder.stage.keeps if anew else ():
        copy(folder.undisturbed() / "none", folder.path / name)
    again = folder.command(folder.stage.arguments if anew else folder.stage.again)
    return _compared(folder, again, ended=ended, left=left, problems=[one for one in problems if one])


def _compared(folder: CaseFolder, again: Ended, *, ended: Ended, left: str, problems: list[str]) -> Outcome:
    found = completed(again)
    if found is not None:
        problems.append(f"second run: {found}")
    problems += [
        f"second run: '{name}' is not that of an undisturbed run"
        for name in folder.stage.outputs
        if contents(folder.path / name) != contents(folder.undisturbed() / name)
    ]
    litter = [path for path in snapshot(folder.path) if _WORKING.search(path)]
    if litter and found is None:
        problems.append(f"second run: left '{litter[0]}'")
    result = "same output" if not any(one.startswith("second run") for one in problems) else again.last_line
    return Outcome(
        saw=f"{ended.code}: {ended.last_line}"[:300],
        left=left,
        again=result[:300],
        problems=tuple(problems),
        ended_well=ended.code == 0,
    )


def _problems_left(folder: CaseFolder, *, before: dict[str, str], ended: Ended, may_differ: bool) -> list[str]:
    """What is wrong on the disk after the fault."""
    after, problems = snapshot(folder.path), list[str]()
    outputs = folder.stage.outputs
    for path, digest in before.items():
        if not _is_below(path, outputs) and after.get(path) != digest:
            problems.append(f"'{path}', which lay there, is {'changed' if path in after else 'gone'}")
    for path in after:
        parent = any(name.startswith(f"{path}/") for name in outputs)
        known = path in before or parent or _is_below(path, (*outputs, *folder.stage.keeps))
        if not known and not _WORKING.search(path):
            problems.append(f"'{path}' is new, and no name of an output")
        kept = _is_below(path, folder.stage.keeps) and not _WORKING.search(path)
        if kept and (folder.path / path).is_file() and not is_whole(folder.path / path):
            problems.append(f"'{path}' is half-made")
    older = folder.baselines.older(folder.stage.name)
    for name in outputs:
        found = contents(folder.path / name)
        whole = found == contents(folder.undisturbed() / name)
        as_before = found == (contents(older / name) if any(_is_below(path, (name,)) for path in before) else {})
        other = may_differ and ended.code == 0 and _is_another(folder.path / name, than=folder.undisturbed() / name)
        if not whole and (not as_before or ended.code == 0) and not other:
            problems.append(f"'{name}' is neither whole nor as it was before")
    return problems


def _is_another(output: Path, *, than: Path) -> bool:
    """Whether an output has all the files of an undisturbed one, each of them whole."""
    files = contents(output)
    return bool(files) and set(files) == set(contents(than)) and all(is_whole(output.parent / file) for file in files)


def _is_below(path: str, names: Sequence[str]) -> bool:
    return any(path == name or path.startswith(f"{name}/") for name in names)


def _new_names(folder: CaseFolder, *, before: dict[str, str]) -> str:
    """Top-most new paths, for the report."""
    new = [path for path in snapshot(folder.path) if path not in before]
    tops = [path for path in new if not any(path.startswith(f"{other}/") for other in new)]
    return ", ".join(tops[:4]) + (" ..." if len(tops) > 4 else "") if tops else "nothing new"


def completed(ended: Ended) -> str | None:
    """It ended well."""
    return None if ended.code == 0 else f"ended with {_told(ended)}"


def refused(match: str = "", *, codes: Sequence[int] = (1, 2)) -> Expectation:
    """It ended with one line of ours that matches a regular expression, and no traceback."""

    def check(ended: Ended) -> str | None:
        lines = [line for line in ended.output.splitlines() if line.startswith("python -m lightning_moe: ")]
        if ended.code not in codes or "Traceback (most recent call last)" in ended.output:
            return f"ended with {_told(ended)}, not with one line and code {' or '.join(map(str, codes))}"
        if len(lines) != 1 or ended.last_line != lines[0].strip():
            return f"said {len(lines)} lines; the last: {ended.last_line[:200]}"
        return None if re.search(match, lines[0]) else f"said '{lines[0]}', expected '{match}'"

    return check


def either(*expectations: Expectation) -> Expectation:
    """One of several holds."""

    def check(ended: Ended) -> str | None:
        found = [expectation(ended) for expectation in expectations]
        return None if None in found else found[0]

    return check


def killed(ended: Ended) -> str | None:
    """SIGKILL ended it."""
    return None if ended.code == -signal.SIGKILL and not ended.timed_out else f"ended with {_told(ended)}, not killed"


def _told(ended: Ended) -> str:
    late = " (too slow, killed)" if ended.timed_out else ""
    trace = "a traceback, " if "Traceback (most recent call last)" in ended.output else ""
    return f"{trace}code {ended.code}{late}: {ended.last_line[:200]}"
