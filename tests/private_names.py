"""Which private names of other libraries our sources use."""

import ast
import inspect
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

OWN = ("lightning_moe", "callbacks")
BUILT_IN = ("builtins", "abc", "typing", "collections")
# Private by their spelling only: documented parts of named tuples, of `os`, and of Python itself.
PUBLIC = {"_fields", "_replace", "_asdict", "_exit", "_thread"}
_STRING = re.compile(r"_[A-Za-z]\w*")


def is_private(name: str) -> bool:
    """Whether a name is spelled as a private one."""
    return name.startswith("_") and name.strip("_") != "" and not (name.startswith("__") and name.endswith("__"))


@dataclass(frozen=True)
class Source:
    """One file of ours.

    Args:
        path: where it lies below the root.
        tree: its syntax.
    """

    path: str
    tree: ast.Module
    members: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.members.update(_members(self.tree))


def sources(root: Path) -> list[Source]:
    """Every module of both packages."""
    files = sorted(file for package in OWN for file in (root / package).rglob("*.py"))
    return [Source(file.relative_to(root).as_posix(), ast.parse(file.read_text(encoding="utf-8"))) for file in files]


def inherited_names(all_sources: list[Source], kinds: Iterable[type]) -> set[str]:
    """Private names that `kinds`, classes of ours, inherit from other libraries and define or set themselves."""
    trees = {source.path: source.tree for source in all_sources}
    found: set[str] = set()
    for kind in kinds:
        path = kind.__module__.replace(".", "/")
        tree = trees[f"{path}.py" if f"{path}.py" in trees else f"{path}/__init__.py"]
        bodies = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == kind.__name__]
        given = set(_members(ast.Module(bodies[:1], []), overriding=True))
        for base in kind.__mro__[1:]:
            if base.__module__.split(".")[0] not in (*OWN, *BUILT_IN):
                found |= given & {*vars(base), *inspect.get_annotations(base)}
    return {name for name in found if is_private(name)}


def private_names(all_sources: list[Source], *, inherited: set[str] = frozenset()) -> dict[str, set[str]]:
    """Name -> the files of ours that use it; `inherited_names` are not ours, though our classes set them."""
    ours = set().union(*(source.members for source in all_sources)) - inherited
    used: dict[str, set[str]] = defaultdict(set)
    for source in all_sources:
        for name in (*_used(source, ours=ours), *(inherited & set(_members(source.tree, overriding=True)))):
            if is_private(name) and name not in PUBLIC:
                used[name].add(source.path)
    return dict(used)


def _members(tree: ast.Module, *, overriding: bool = False) -> Iterator[str]:
    """What our classes define: methods, those marked `override` only if asked for, class and own attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for part in node.body:
                if isinstance(part, ast.FunctionDef) and (overriding or not _overrides(part)):
                    yield part.name
                elif isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                    yield part.target.id
                elif isinstance(part, ast.Assign):
                    yield from (target.id for target in part.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
            yield node.attr


def _used(source: Source, *, ours: set[str]) -> Iterator[str]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.split(".")[0] not in OWN:
            yield from (*node.module.split("."), *(alias.name for alias in node.names))
        elif isinstance(node, ast.Import):
            yield from (part for alias in node.names for part in alias.name.split("."))
        elif isinstance(node, ast.FunctionDef) and _overrides(node) and node.name not in ours:
            yield node.name
        elif isinstance(node, ast.Attribute) and node.attr not in (ours if _is_self(node.value) else source.members):
            yield node.attr
        elif isinstance(node, ast.keyword) and node.arg is not None and node.arg not in ours:
            yield node.arg
        else:
            yield from (text for text in _looked_up(node) if _STRING.fullmatch(text))


def _looked_up(node: ast.AST) -> list[str]:
    """Strings that may name an attribute: in `[...]`, in calls of `get` and `getattr`, and in lists of names."""
    parts: list[ast.expr] = []
    if isinstance(node, ast.Subscript):
        parts = [node.slice]
    elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("get", "pop", "getattr"):
        parts = node.args
    elif isinstance(node, ast.Tuple | ast.List | ast.Set):
        parts = node.elts
    return [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]


def _is_self(node: ast.expr) -> bool:
    """`self`, `cls` or `super()`: names of ours are looked for in all classes of ours."""
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id == "super"
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def _overrides(node: ast.FunctionDef) -> bool:
    return any(isinstance(decorator, ast.Name) and decorator.id == "override" for decorator in node.decorator_list)
