"""Blocks of lines that stand in more than one place."""

import ast
import re
from collections import defaultdict
from collections.abc import Sequence

from measures.source import Function, Measured, Source, none_of

BLOCK = 6
_HANDED_ON = re.compile(r"(\w+)=\1,?")


def measure_repeats(library: Sequence[Source], *, beside: Sequence[Source]) -> list[Measured]:
    """Places where six lines of code stand that stand elsewhere too."""
    return [
        none_of(f"blocks of {BLOCK} lines twice (library)", found=repeated(library)),
        none_of(f"blocks of {BLOCK} lines twice (anywhere)", found=repeated([*library, *beside])),
    ]


def repeated(sources: Sequence[Source]) -> list[str]:
    """`file:line = file:line (lines)` of each longest run of equal lines, blank lines and comments not counted.

    Imports, `__all__`, docstrings, signatures, arguments handed on under their own name (`dtype=dtype`), lines of
    nothing but brackets: they are what an interface with keywords is made of, and say nothing about copied code.
    """
    places: dict[tuple[str, ...], list[tuple[str, int]]] = defaultdict(list)
    lines = {source.name: _lines(source) for source in sources}
    for name, numbered in lines.items():
        for start in range(len(numbered) - BLOCK + 1):
            block = tuple(text for _, text in numbered[start : start + BLOCK])
            places[block].append((name, start))
    found = []
    for block, where in places.items():
        (name, start), *others = where
        for other, at in others:
            before = start and at and lines[name][start - 1][1] == lines[other][at - 1][1]
            if not before and not (name == other and at - start < BLOCK):
                first = f"{name}:{lines[name][start][0]} = {other}:{lines[other][at][0]}"
                found.append(f"{first} ({_common(lines[name][start:], lines[other][at:])} lines) {block[0]}")
    return sorted(found)


def _common(one: Sequence[tuple[int, str]], other: Sequence[tuple[int, str]]) -> int:
    """Equal lines from the beginning."""
    pairs = zip(one, other, strict=False)
    return next((count for count, (a, b) in enumerate(pairs) if a[1] != b[1]), min(len(one), len(other)))


def _lines(source: Source) -> list[tuple[int, str]]:
    """(line number, text) of the lines that count."""
    skip = _skipped(source.tree)
    numbered = ((number, line.strip()) for number, line in enumerate(source.lines, start=1) if number not in skip)
    counted = ((number, text) for number, text in numbered if text.strip("()[]{},: ") and not text.startswith("#"))
    return [(number, text) for number, text in counted if not _HANDED_ON.fullmatch(text)]


def _skipped(tree: ast.Module) -> set[int]:
    """Lines of imports, `__all__`, docstrings and signatures."""
    skip: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, Function):
            skip.update(range(node.lineno, max(node.lineno + 1, node.body[0].lineno)))
        string = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        listed = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        if string or listed or isinstance(node, ast.Import | ast.ImportFrom):
            skip.update(range(node.lineno, node.end_lineno + 1))
    return skip
