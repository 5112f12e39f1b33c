"""Raised messages: whether they carry the value, and whether a test looks for them.

A message counts as tested where some string of the tests, read as the pattern of `match=`, can match it: placeholders
match anything, `.*` matches anything, and at least `_SHARED` letters, `_TOGETHER` of them in a row, must be the
message's own words. A string that is a name (a key, a path, a module) is no pattern. Messages that are made elsewhere
(`raise ValueError(reason)`), or have fewer words, cannot be judged by their text and are not counted. The share is an
upper bound: placeholders of a message can take words of a pattern that was written for another one.
"""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from measures.source import Measured, Source, percent

VALUE_SHARE = 0.9
_SHARED, _TOGETHER = 12, 8
_HOLE = "\0"
_NAME = re.compile(r"[\w./:-]*")
# A value that is always the same stands in the text itself.
_NOTHING = re.compile(r"\b(got|is|are|has|have) (none|no|not|0|`?false|`?true)\b|\b[Tt]here (is|are) no|^No ")


@dataclass(frozen=True, kw_only=True)
class Message:
    """A raised message: its text with `_HOLE` for each value, and where it stands."""

    text: str
    where: str


def measure_raises(library: Sequence[Source], *, tests: Sequence[Source]) -> list[Measured]:
    """Shares of raises whose message carries a value, and of those that a test matches."""
    raised = [message for source in library for message in _messages(source)]
    messages = [message for message in raised if _can_be_judged(message.text)]
    without = [message.where for message in messages if _HOLE not in message.text and not _NOTHING.search(message.text)]
    patterns = _Patterns(tests)
    untested = [message.where for message in messages if not patterns.match(message.text)]
    carried = len(messages) - len(without)
    return [
        Measured(
            name="raises that carry a value",
            value=f"{percent(carried, len(messages))}; {len(raised) - len(messages)} not judged",
            target=f">= {VALUE_SHARE:.0%}",
            holds=carried >= VALUE_SHARE * len(messages),
            offenders=tuple(without),
        ),
        Measured(
            name="raises whose message a test looks for",
            value=percent(len(messages) - len(untested), len(messages)),
            target="100 %",
            holds=not untested,
            offenders=tuple(untested),
        ),
    ]


def _messages(source: Source) -> Iterator[Message]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            text = _template(node.exc.args[0])
            yield Message(text=text, where=source.at(node, text.replace(_HOLE, "{}")[:90]))


def _can_be_judged(text: str) -> bool:
    pieces = [len(piece) for piece in text.split(_HOLE)]
    return sum(pieces) >= _SHARED and max(pieces) >= _TOGETHER


def _template(node: ast.expr) -> str:
    """The constant text of a string expression, `_HOLE` for everything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_template(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _template(node.left) + _template(node.right)
    return _HOLE


class _Patterns:
    """The strings of the tests, found again by any `_TOGETHER` letters of theirs."""

    def __init__(self, tests: Sequence[Source]) -> None:
        self._by_letters: dict[str, set[str]] = defaultdict(set)
        texts = (text for source in tests for text in _strings(source.tree))
        for pattern in {_plain(choice) for text in texts for choice in text.split("|") if not _NAME.fullmatch(choice)}:
            for start in range(len(pattern) - _TOGETHER + 1):
                self._by_letters[pattern[start : start + _TOGETHER]].add(pattern)

    def match(self, message: str) -> bool:
        starts = range(len(message) - _TOGETHER + 1)
        windows = [message[start : start + _TOGETHER] for start in starts]
        found = set().union(*(self._by_letters.get(window, ()) for window in windows if _HOLE not in window))
        return any(_can_match(pattern, message) for pattern in found)


def _strings(tree: ast.Module) -> Iterator[str]:
    """Every string of a test file that is not a docstring, f-strings with a hole for each value."""
    skip = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    skip |= {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr | ast.Constant) and id(node) not in skip:
            text = _template(node)
            if text.strip(_HOLE):
                yield text


def _plain(pattern: str) -> str:
    r"""A regular expression as letters and holes: `.*`, `.+`, `\d+`, classes and groups are holes."""
    text = re.sub(r"\(\?[^)]*\)|(?<!\\)[()]|\[[^\]]*\][*+?]?|(?<!\\)\.[*+]\??|\\[dwsSDWb][*+?]?", _HOLE, pattern)
    return re.sub(r"\\(.)", r"\1", text)


def _can_match(pattern: str, message: str) -> bool:
    """Whether `pattern` is found in `message`, both with holes: the sets of places reached, letter by letter.

    A state is (place in the message, letters that both spell out, capped). `.` of a pattern is any letter.
    """
    states = {(place, 0) for place in range(len(message))}
    for letter in pattern:
        states = _step(states, letter=letter, message=message)
    return any(shared >= _SHARED for _, shared in states)


def _step(states: set[tuple[int, int]], *, letter: str, message: str) -> set[tuple[int, int]]:
    reached: set[tuple[int, int]] = set()
    for place, shared in states:
        if letter == _HOLE:
            reached |= {(later, shared) for later in range(place, len(message) + 1)}
            continue
        at = place
        while at < len(message) and message[at] == _HOLE:  # the hole may be this letter, or end here
            reached.add((at, shared))
            at += 1
        if at < len(message) and letter in (message[at], "."):
            reached.add((at + 1, min(shared + 1, _SHARED)))
    return reached
