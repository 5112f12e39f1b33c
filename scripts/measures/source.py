"""Python files of the project, parsed once, and what every measure reads from them."""

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIBRARY = ("lightning_moe", "callbacks")
BESIDE = ("tests", "scripts")

Function = ast.FunctionDef | ast.AsyncFunctionDef
Documented = ast.Module | ast.ClassDef | Function


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One line of the table.

    Args:
        name: What was measured.
        value: The figure, as it is printed.
        target: The bound, as it is printed.
        holds: Whether the figure keeps the bound.
        offenders: Places that break it, `file:line what`.
    """

    name: str
    value: str
    target: str
    holds: bool
    offenders: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Source:
    """A file and its syntax tree."""

    path: Path
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        """The parsed file."""
        return ast.parse(self.text, filename=str(self.path))

    @cached_property
    def lines(self) -> list[str]:
        """Its lines without line ends."""
        return self.text.splitlines()

    @cached_property
    def name(self) -> str:
        """Path from the project's root."""
        return self.path.relative_to(ROOT).as_posix()

    @cached_property
    def functions(self) -> list[Function]:
        """Every function and method, nested ones too."""
        return [node for node in ast.walk(self.tree) if isinstance(node, Function)]

    def public(self) -> Iterator[tuple[str, Documented]]:
        """(name, node) of the module and of what it offers: functions, classes and methods without a leading `_`."""
        yield self.name, self.tree
        yield from _public(self.tree, prefix="")

    def at(self, node: ast.AST, what: str = "") -> str:
        """`file:line what`."""
        return f"{self.name}:{getattr(node, 'lineno', 1)} {what}".rstrip()


def _public(owner: ast.Module | ast.ClassDef, *, prefix: str) -> Iterator[tuple[str, Documented]]:
    for node in owner.body:
        if not isinstance(node, ast.ClassDef | Function) or node.name.startswith("_"):
            continue
        yield prefix + node.name, node
        if isinstance(node, ast.ClassDef):
            yield from _public(node, prefix=f"{node.name}.")


def read_sources(*folders: str) -> list[Source]:
    """Every Python file below the folders, by name."""
    paths = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return [Source(path=path, text=path.read_text(encoding="utf-8")) for path in paths]


def docstring_lines(node: Function) -> int:
    """Lines that the docstring takes, 0 without one."""
    first = node.body[0]
    return first.end_lineno - first.lineno + 1 if ast.get_docstring(node, clean=False) is not None else 0


def percent(part: int, whole: int) -> str:
    """`98.7 % (519 of 526)`."""
    return f"{100 * part / max(whole, 1):.1f} % ({part} of {whole})"


def all_of(name: str, *, broken: Sequence[str], whole: int) -> Measured:
    """A share that has to be 100 %."""
    value = percent(whole - len(broken), whole)
    return Measured(name=name, value=value, target="100 %", holds=not broken, offenders=tuple(broken))


def none_of(name: str, *, found: Sequence[str]) -> Measured:
    """A number that has to be 0."""
    return Measured(name=name, value=str(len(found)), target="0", holds=not found, offenders=tuple(found))
