"""Files that are cut short or have flipped bits: what a stage reads, and what an interrupted run has left."""

import os
import random
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

from faults.cases import Case, CaseFolder, Outcome, completed, disturbed, either, killed, place, refused
from faults.places import at_place
from faults.snapshots import contents
from faults.stages import STAGES

from lightning_moe.renaming import remove

_MODEL = ("model/model.safetensors", "model/config.json")
_TEXT = ("model/tokenizer.json", "text/a.jsonl", "data.yaml")
_ADAPTED = (
    "base/model.safetensors",
    "base/config.json",
    "adapter/adapter_model.safetensors",
    "adapter/adapter_config.json",
)
_READ = {
    "calibrate": (*_MODEL, *_TEXT),
    "plan": ("out/statistics.safetensors",),
    "prune": (*_MODEL, *_TEXT, "out/plan.json"),
    "quantise": (*_MODEL, "out/plan.json"),
    "pack": _MODEL,
    "recover": (*_MODEL, *_TEXT, "fit.yaml"),
    "export": tuple(f"out/recovered/adapter/{name}" for name in _ADAPTED),
}
# Shares of a file that are left; -1: all but the last byte.
_LEFT = {"empty": 0.0, "half": 0.5, "a byte short": -1.0}
_LONG_FLIPS, _QUICK_FLIPS = 12, 1
_WORKS = {"calibrate": 0.6, "prune": 0.7, "quantise": 0.7, "pack": 0.5, "export": 0.7}


def truncate(file: Path, *, left: float) -> None:
    """Cuts a file short."""
    size = file.stat().st_size
    os.truncate(file, size - 1 if left < 0 else int(size * left))


def flip(file: Path, *, seed: int) -> None:
    """Flips one bit, anywhere: half of the time in the first kilobyte, where a file says what it is."""
    drawn, content = random.Random(f"{file.name} {seed}"), bytearray(file.read_bytes())
    if content:
        last = min(len(content), 1024) if seed % 2 else len(content)
        content[drawn.randrange(last)] ^= 1 << drawn.randrange(8)
        file.write_bytes(bytes(content))


def _damaged(name: str, damage: Callable[[Path], None], folder: CaseFolder, *, told: bool) -> Outcome:
    expects = refused() if told else either(refused(), completed)
    return disturbed(folder, spoil=lambda path: damage(path / name), expects=expects, may_differ=not told)


def _left_damaged(damage: Callable[[Path], None], folder: CaseFolder, *, ends: str = "") -> Outcome:
    """A killed run, damage to every file that it left (whose name `ends` so), the same command again.

    Where that is refused, once more without what was left.
    """
    die = at_place(place(folder, _WORKS[folder.stage.name]), lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    problems = [killed(folder.command(folder.stage.arguments, child=die))]
    files = [file for file in _working(folder) if file.is_file() and not file.name.endswith("lock")]
    left = [file for file in files if file.name.endswith(ends)]
    if not left:
        problems.append("the killed run left nothing to damage")
    for file in left:
        damage(file)
    again = folder.command(folder.stage.arguments)
    problems.append(either(refused(), completed)(again))
    if again.code == 0:
        problems += _other_than_undisturbed(folder)
    for file in _working(folder) if again.code else ():
        remove(file)
    last = folder.command(folder.stage.again)
    problems += [completed(last), *_other_than_undisturbed(folder)]
    return Outcome(
        saw=f"{again.code}: {again.last_line}"[:300],
        left=f"{len(left)} damaged files of an interrupted run",
        again="same output" if not any(problems) else last.last_line[:300],
        problems=tuple(dict.fromkeys(problem for problem in problems if problem)),
        ended_well=again.code == 0,
    )


def _working(folder: CaseFolder) -> list[Path]:
    return [file for file in (folder.path / "out").rglob("*") if ".partial" in str(file) or ".unfinished" in str(file)]


def _other_than_undisturbed(folder: CaseFolder) -> list[str]:
    return [
        f"'{name}' is not that of an undisturbed run"
        for name in folder.stage.outputs
        if contents(folder.path / name) != contents(folder.undisturbed() / name)
    ]


def _cases() -> list[Case]:
    made = []
    for stage in STAGES:
        for name in _READ[stage]:
            binary = name.endswith(".safetensors")
            for how, left in _LEFT.items():
                told = binary or how == "empty"
                run = partial(_damaged, name, partial(truncate, left=left), told=told)
                quick = how == "half" or (binary and how == "a byte short")
                title = f"{Path(name).name}, {how}"
                made.append(Case(name=title, stage=stage, fault="truncated file", quick=quick, run=run))
            for seed in range(_LONG_FLIPS):
                run = partial(_damaged, name, partial(flip, seed=seed), told=False)
                title = f"{Path(name).name}, bit {seed}"
                quick = seed < _QUICK_FLIPS
                made.append(Case(name=title, stage=stage, fault="flipped bit", quick=quick, run=run))
    for stage in _WORKS:
        for how, damage in (("cut", partial(truncate, left=0.5)), ("bit", partial(flip, seed=0))):
            run = partial(_left_damaged, damage)
            made.append(Case(name=how, stage=stage, fault="damaged leftovers", run=run))
    for stage in ("prune", "quantise", "pack"):  # the description of the run is whole: the shards have to tell
        run = partial(_left_damaged, partial(flip, seed=0), ends=".safetensors")
        made.append(Case(name="bit in a shard", stage=stage, fault="damaged leftovers", run=run))
    return made


CASES: list[Case] = _cases()
