"""Checks of JSON before a parser in C reads it that ends the process, instead of raising, for some of it."""

import re
from pathlib import Path

import numpy as np

# Texts and conversations are a few levels deep.
DEEPEST = 100
_ESCAPED = re.compile(rb"\\.", re.DOTALL)
_STRING = re.compile(rb'"[^"]*"?')
_BLANK = b" \t\r\n\xef\xbb\xbf"  # a byte order mark, too
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def check_json(file: str | Path, *, name: str) -> None:
    """Refuses a file of JSON, one value a line or one in all, at which the parser would end the process.

    That is one nested more than `DEEPEST` levels deep, and one with `null` where a record should begin.

    Args:
        file: to read; a line of it is in memory at a time.
        name: of the corpus, for the message.

    Raises:
        ValueError: with the number of the line.
    """
    has_records = Path(file).suffix == ".jsonl"  # or one value in all, over many lines
    begun = False
    with Path(file).open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            where = f"Corpus {name!r}: line {number} of '{file}'"
            if line.count(b"[") + line.count(b"{") > DEEPEST and depth(line) > DEEPEST:
                raise ValueError(f"{where} is nested more than {DEEPEST} levels deep. Remove it.")
            text = line.strip(_BLANK)
            if text.startswith(b"null") and (has_records or not begun):
                raise ValueError(f"{where} is null and no record. Remove it.")
            if text and not begun:
                begun, has_records = True, has_records or text.endswith(b"}")


def depth(text: bytes) -> int:
    """Levels of lists and objects in JSON, as it stands: brackets inside strings do not count.

    >>> depth(b'{"text": ["[[[[", {"a": 1}]}')
    3
    """
    brackets = _STRING.sub(b"", _ESCAPED.sub(b"", text)).translate(None, _NOT_BRACKETS)
    kind = np.frombuffer(brackets, dtype=np.uint8)
    opened = (kind == ord("[")) | (kind == ord("{"))
    return int(np.where(opened, 1, -1).cumsum().max(initial=0))
