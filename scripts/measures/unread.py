"""Names of modules that nothing reads."""

import ast
import re
from collections.abc import Iterator, Sequence

from measures.source import ROOT, Function, Measured, Source, none_of


def measure_unread(library: Sequence[Source]) -> list[Measured]:
    """Functions, classes and constants of the library that no file of it uses and no page tells users of."""
    pages = "\n".join(page.read_text(encoding="utf-8") for page in sorted(ROOT.rglob("*.md")) if _is_ours(page.parts))
    found = [where for name, where in unread(library) if not re.search(rf"`{name}[`(]|import .*\b{name}\b", pages)]
    return [none_of("names that nothing reads (library)", found=found)]


def _is_ours(parts: Sequence[str]) -> bool:
    return not {".venv", "build", "runs"} & set(parts[len(ROOT.parts) :])


def unread(library: Sequence[Source]) -> list[tuple[str, str]]:
    """(name, `file:line name`) of what stands at the top of a module and is read nowhere, decorated functions apart."""
    nodes = [node for source in library for node in ast.walk(source.tree)]
    elsewhere = {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    elsewhere |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return [
        (name, source.at(node, name))
        for source in library
        for name, node in _defined(source.tree)
        if name not in elsewhere and name not in _read(source.tree, but=node)
    ]


def _defined(tree: ast.Module) -> Iterator[tuple[str, ast.stmt]]:
    for node in tree.body:
        if isinstance(node, ast.ClassDef) or (isinstance(node, Function) and not node.decorator_list):
            yield node.name, node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            yield from ((name, node) for name in names if not name.startswith("__"))


def _read(tree: ast.Module, *, but: ast.stmt) -> set[str]:
    """Names that a module reads outside of one statement; those in strings, as annotations may be, count."""
    rest = [node for statement in tree.body if statement is not but for node in ast.walk(statement)]
    names = {node.id for node in rest if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    return names | {node.value for node in rest if isinstance(node, ast.Constant) and isinstance(node.value, str)}
