"""Lengths of files and functions."""

import ast
from collections.abc import Sequence
from statistics import median, quantiles

from measures.source import Function, Measured, Source, docstring_lines

FILE_MEDIAN, FILE_MOST, CALLBACK_MOST = 130, 350, 200
FUNCTION_MEDIAN, FUNCTION_P90, FUNCTION_MOST = 10, 25, 50
HOOK_MOST = 20


def measure_files(library: Sequence[Source], *, beside: Sequence[Source]) -> list[Measured]:
    """Lines of files: the library's median, the longest of each area, the longest callback."""
    middle = median(len(source.lines) for source in library)
    callbacks = [source for source in library if source.name.startswith("callbacks/")]
    return [
        Measured(
            name="file length, median (library)",
            value=f"{middle:.0f} lines ({len(library)} files)",
            target=f"<= {FILE_MEDIAN}",
            holds=middle <= FILE_MEDIAN,
        ),
        _longest_file("longest file (library)", library, most=FILE_MOST),
        _longest_file("longest file (tests, scripts)", beside, most=FILE_MOST),
        _longest_file("longest callback", callbacks, most=CALLBACK_MOST),
    ]


def _longest_file(name: str, sources: Sequence[Source], *, most: int) -> Measured:
    over = [f"{source.name} {len(source.lines)} lines" for source in sources if len(source.lines) > most]
    longest = max(len(source.lines) for source in sources)
    return Measured(name=name, value=f"{longest} lines", target=f"<= {most}", holds=not over, offenders=tuple(over))


def code_lines(node: Function) -> int:
    """Lines of a function from `def` to its end, without its docstring."""
    return node.end_lineno - node.lineno + 1 - docstring_lines(node)


def measure_functions(library: Sequence[Source], *, beside: Sequence[Source]) -> list[Measured]:
    """Lines of functions without their docstrings: median and 90th percentile of the library, longest of both."""
    lengths = [code_lines(node) for source in library for node in source.functions]
    with_docs = [code_lines(node) + docstring_lines(node) for source in library for node in source.functions]
    middle, p90 = median(lengths), quantiles(lengths, n=10)[-1]
    return [
        Measured(
            name="function length, median (library)",
            value=f"{middle:.0f} lines ({len(lengths)} functions; {median(with_docs):.0f} with docstring)",
            target=f"<= {FUNCTION_MEDIAN}",
            holds=middle <= FUNCTION_MEDIAN,
        ),
        Measured(
            name="function length, 90th percentile (library)",
            value=f"{p90:.0f} lines ({quantiles(with_docs, n=10)[-1]:.0f} with docstring)",
            target=f"<= {FUNCTION_P90}",
            holds=p90 <= FUNCTION_P90,
        ),
        _longest_function("longest function (library)", library, most=FUNCTION_MOST),
        _longest_function("longest function (tests, scripts)", beside, most=FUNCTION_MOST),
        _longest_hook([source for source in library if source.name.startswith("callbacks/")]),
    ]


def _longest_function(name: str, sources: Sequence[Source], *, most: int) -> Measured:
    nodes = [(source, node) for source in sources for node in source.functions]
    found = [(code_lines(node), source.at(node, node.name)) for source, node in nodes]
    over = tuple(f"{where} {length} lines" for length, where in sorted(found, reverse=True) if length > most)
    value = (
        f"{max(found)[0]} lines ({max(code_lines(node) + docstring_lines(node) for _, node in nodes)} with docstring)"
    )
    return Measured(name=name, value=value, target=f"<= {most}", holds=not over, offenders=over)


def _longest_hook(callbacks: Sequence[Source]) -> Measured:
    hooks = [
        (code_lines(node), source.at(node, node.name))
        for source in callbacks
        for node in source.functions
        if any(isinstance(mark, ast.Name) and mark.id == "override" for mark in node.decorator_list)
    ]
    over = tuple(f"{where} {length} lines" for length, where in sorted(hooks, reverse=True) if length > HOOK_MOST)
    return Measured(
        name="longest hook of a callback",
        value=f"{max(hooks)[0]} lines ({len(hooks)} hooks)",
        target=f"<= {HOOK_MOST}",
        holds=not over,
        offenders=over,
    )
