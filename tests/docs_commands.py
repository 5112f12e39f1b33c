"""Commands, flags and settings that the pages name, looked up in the real parsers."""

import dataclasses
import importlib
import re
import typing
from collections.abc import Mapping
from functools import cache
from inspect import Parameter, signature
from pathlib import Path

from docs_names import code
from docs_pages import ROOT
from lightning import Trainer

import callbacks
from lightning_moe import cli
from lightning_moe.training.data import TextDataModule
from lightning_moe.training.module import RecoveryModule

TRAINING = ("fit", "validate")
_FLAG = re.compile(r"(?<![\w-])--([A-Za-z][\w.-]*)")
# Options of Lightning's command line itself.
_LIGHTNING = {"config", "seed_everything", "ckpt_path", "help", "print_config", "weights_only", "version"}


@cache
def groups() -> Mapping[str, type]:
    """Argument groups of `fit` and the classes whose arguments they hold."""
    ours = {group: vars(callbacks)[name] for group, name in cli.CALLBACK_GROUPS.items()}
    return {**ours, "model": RecoveryModule, "data": TextDataModule, "trainer": Trainer}


def is_setting(dotted: str) -> bool:
    """Whether `group.argument`, or a field of such an argument further down, can be given to `fit`."""
    group, *names = dotted.split(".")
    owner: typing.Any = groups().get(group)
    for name in names:
        if name == "help":
            return True
        known = _arguments(owner)
        if name not in known:
            return owner is None or typing.get_origin(owner) is dict
        owner = known[name]
    return True


def _arguments(owner: typing.Any) -> dict[str, typing.Any]:
    """Arguments of a class with the dataclass or dict they hold, if any."""
    if not isinstance(owner, type):
        return {}
    hints = typing.get_type_hints(owner.__init__)
    known = [
        p.name for p in signature(owner).parameters.values() if p.kind is Parameter.KEYWORD_ONLY or owner is Trainer
    ]
    return {name: _holder(hints.get(name)) for name in known}


def _holder(hint: typing.Any) -> typing.Any:
    options = typing.get_args(hint) or (hint,)
    return next((option for option in options if dataclasses.is_dataclass(option)), None)


@cache
def options(command: str) -> frozenset[str]:
    """Names of the options of one of our commands, without dashes."""
    actions = cli.command_parser(command)._actions
    return frozenset(text.removeprefix("--") for action in actions for text in action.option_strings)


@cache
def script_options() -> frozenset[str]:
    """Options of the programs in `scripts`, and of those that the pages also name: pip, pytest, torchrun, srun."""
    files = [file for ending in ("py", "sh") for file in (ROOT / "scripts").rglob(f"*.{ending}")]
    named = {name for file in files for name in re.findall(r"\"--([\w-]+)\"", file.read_text(encoding="utf-8"))}
    return frozenset(named | {"no-deps", "nproc_per_node", "kill-on-bad-exit"})


def unknown_flags(text: str) -> list[str]:
    """Flags in a piece of code that its command, or any command where it names none, does not have."""
    words = text.removeprefix("python -m lightning_moe ").removeprefix("`").split()
    flags = _FLAG.findall(text)
    if not words or not flags:
        return []
    if words[0] in cli.COMMANDS:
        return [flag for flag in flags if flag not in options(words[0]) and not _of_data(flag)]
    if words[0] in TRAINING:
        return [flag for flag in flags if not _of_fit(flag)]
    everywhere = script_options().union(*(options(command) for command in cli.COMMANDS))
    return [flag for flag in flags if flag not in everywhere and not _of_fit(flag)]


def _of_fit(flag: str) -> bool:
    return (
        flag in _LIGHTNING
        or flag in cli.CALLBACK_GROUPS
        or ("." in flag and flag.split(".")[0] in groups() and is_setting(flag.rstrip("+")))
    )


def _of_data(flag: str) -> bool:
    return flag.startswith("data.") and is_setting(flag)


def named_settings(page: Path) -> list[str]:
    """Words such as `data.calibration` in the text of a page."""
    words = [word for part in code(page) if "(" not in part for word in re.split(r"[\s:,;'\"=]+", part)]
    setting = re.compile(rf"({'|'.join(groups())})(\.[a-z_]+)+")
    return [word for word in words if setting.fullmatch(word) and not word.endswith(".yaml")]


def is_python_name(dotted: str) -> bool:
    """Whether a dotted name of ours can be imported."""
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        name = ".".join(parts[:cut])
        if _is_module(name):
            found: object = importlib.import_module(name)
            for attribute in parts[cut:]:
                if attribute not in dir(found):
                    return False
                found = getattr(found, attribute)
            return True
    return False


def is_test(named: str) -> bool:
    """Whether `tests/FILE.py::FUNCTION` is there."""
    file, _, function = named.partition("::")
    return (ROOT / file).is_file() and f"\ndef {function}(" in (ROOT / file).read_text(encoding="utf-8")


def _is_module(name: str) -> bool:
    file = ROOT / name.replace(".", "/")
    return file.is_dir() or file.with_suffix(".py").is_file()


def python_names(page: Path) -> list[str]:
    """Dotted names of our packages in the text of a page."""
    return [name for part in code(page) for name in re.findall(r"\b(?:lightning_moe|callbacks)(?:\.\w+)+", part)]
