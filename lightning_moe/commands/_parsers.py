"""Parsers of the command line, whose help fits the terminal and whose refusals are in words."""

import re
import shutil
import textwrap
from typing import Any

from jsonargparse import ArgumentParser, DefaultHelpFormatter
from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

PROGRAM = "python -m lightning_moe"
# What the parser calls a type -> what a user writes.
_WORDS = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "list": "a list, such as `[one, two]`",
    "dict": "a mapping, such as `{name: value}`",
}
_TYPE = re.compile(r"Expected an? <class '(\w+)'>\.?")
_CHOICE = re.compile(r"Expected an? typing\.Literal\[(.*?)\]\.?(?=\s|$)")
_KEY = re.compile(r'Parser key "([\w.+]+)":')
# Options of `fit` and `validate` come with their subcommand before them.
_REQUIRED = re.compile(r"(?<=arguments are required: )(fit|validate)\.[\w., ]*")
_MISSING = re.compile(r"(?<=arguments are required: )[\w., ]*\w")
_GIVEN = re.compile(r"(?:Given|Got) value: (.*?)\.?$")


def usage(name: str) -> str:
    """How a subcommand is called."""
    return f"{PROGRAM} {name} [--config FILE] [options]"


def fitted(text: str, *, indent: int = 0) -> str:
    """A line broken at the terminal's width, its later lines indented."""
    columns = shutil.get_terminal_size().columns
    return textwrap.fill(
        text, width=max(columns - 2, 40), subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )


def in_words(line: str) -> str:
    r"""A line of the parser's, with types as a user would name them.

    >>> in_words('Parser key "bits": Expected a typing.Literal[4, 16]. Got value: 8')
    '`bits`: Expected one of 4, 16. Got 8.'
    >>> in_words('Parser key "corpora": Expected a <class \'list\'>')
    '`corpora`: Expected a list, such as `[one, two]`.'
    >>> in_words("the following arguments are required: model, data.tokenizer.")
    'the following arguments are required: `model`, `data.tokenizer`.'
    """
    line = _TYPE.sub(lambda found: f"Expected {_WORDS.get(found[1], found[1])}.", line)
    line = _REQUIRED.sub(lambda found: found[0].replace(f"{found[1]}.", ""), line)
    line = _MISSING.sub(lambda found: ", ".join(f"`{name}`" for name in found[0].split(", ")), line)
    line = _CHOICE.sub(r"Expected one of \1.", line)
    return _GIVEN.sub(r"Got \1.", _KEY.sub(r"`\1`:", line))


class _Formatter(DefaultHelpFormatter):
    """Headings of groups are sentences here, and as long: broken like everything else."""

    @override
    def start_section(self, heading: str | None) -> None:
        super().start_section(None if heading is None else fitted(heading))


def _defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """For parsers that the library makes itself too, for the help of one class: it would name the running file."""
    return {"usage": usage("SUBCOMMAND"), "formatter_class": _Formatter} | settings


class CommandParser(ArgumentParser):
    """Of one thin command."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **_defaults(kwargs))


class TrainingParser(LightningArgumentParser):
    """Of `fit` and `validate`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **_defaults(kwargs))
