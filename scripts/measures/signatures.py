"""Annotations, docstrings, shapes, units, and arguments that may be positional."""

import ast
import re
from collections.abc import Iterator, Sequence

from measures.source import Documented, Function, Measured, Source, all_of, percent

_SUFFIX = re.compile(r"_(?:[A-Z][A-Za-z0-9]{0,3}|[a-z][A-Z])$")
_SHAPE = re.compile(
    r"\[[A-Za-z0-9_*+/\-. ]+(, [A-Za-z0-9_*+/\-. ]+)*\]|_[A-Z][A-Za-z0-9]{0,3}\b|\b([Ss]calar|[Ss]hape)"
)
_SCORES = {"ChannelScores", "ExpertScores"}
_UNIT = re.compile(r"\bunits?\b", re.IGNORECASE)


def measure_signatures(library: Sequence[Source]) -> list[Measured]:
    """Annotations and docstrings of the library."""
    return [
        _annotations(library),
        _docstrings(library),
        _shapes(library),
        _legends(library),
        _criteria(library),
        _positional(library),
    ]


def arguments(node: Function) -> Iterator[ast.arg]:
    """Its arguments but `self` and `cls`."""
    given = node.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    yield from (arg for arg in named if arg is not None and arg.arg not in {"self", "cls"})


def _annotations(library: Sequence[Source]) -> Measured:
    missing, total = [], 0
    for source in library:
        for node in source.functions:
            gaps = [arg.arg for arg in arguments(node) if arg.annotation is None]
            gaps += ["return"] if node.returns is None else []
            total += len(list(arguments(node))) + 1
            missing += [source.at(node, f"{node.name}: {gap}") for gap in gaps]
    return all_of("annotations", broken=missing, whole=total)


def _is_override(node: Documented) -> bool:
    marks = [] if isinstance(node, ast.Module) else node.decorator_list
    return any(isinstance(mark, ast.Name) and mark.id in {"override", "overload"} for mark in marks)


def _docstrings(library: Sequence[Source]) -> Measured:
    public = [(source, name, node) for source in library for name, node in source.public()]
    public = [(source, name, node) for source, name, node in public if not _is_override(node) and _says(node)]
    missing = [source.at(node, name) for source, name, node in public if ast.get_docstring(node) is None]
    return all_of("public docstrings", broken=missing, whole=len(public))


def _says(node: Documented) -> bool:
    """Whether a docstring is due: not for empty modules, and not for `__init__` and its kin."""
    if isinstance(node, ast.Module):
        return bool(node.body)
    return not (node.name.startswith("__") and node.name.endswith("__"))


def _public_functions(source: Source) -> Iterator[tuple[str, Function]]:
    for name, node in source.public():
        if isinstance(node, Function) and not _is_override(node):
            yield name, node


def _shapes(library: Sequence[Source]) -> Measured:
    """Public functions on plain tensors: each says a shape, in a name's suffix or in the docstring."""
    broken, total = [], 0
    for source in library:
        for name, node in _public_functions(source):
            plain = [arg for arg in arguments(node) if _is_tensor(arg.annotation)]
            if not plain and not _is_tensor(node.returns):
                continue
            total += 1
            documented = _SHAPE.search(ast.get_docstring(node) or "") is not None
            unnamed = [arg.arg for arg in plain if not _SUFFIX.search(arg.arg)]
            if not documented and (unnamed or _is_tensor(node.returns)):
                broken.append(source.at(node, f"{name}: {', '.join(unnamed) or 'return'}"))
    return all_of("functions on tensors that say their shapes", broken=broken, whole=total)


def _is_tensor(annotation: ast.expr | None) -> bool:
    return annotation is not None and ast.unparse(annotation) in {"Tensor", "torch.Tensor", "Tensor | None"}


def _legends(library: Sequence[Source]) -> Measured:
    """Files with shape-suffix names explain each letter, in a comment or in the module's docstring."""
    broken, total = [], 0
    for source in library:
        letters = {letter for name in _names(source.tree) if (found := _SUFFIX.search(name)) for letter in found[0][1:]}
        letters = {letter for letter in letters if letter.isupper()}
        if not letters:
            continue
        total += 1
        legend = " ".join([ast.get_docstring(source.tree) or "", *(line for line in source.lines if line[:1] == "#")])
        unsaid = sorted(letter for letter in letters if not re.search(rf"\b{letter}\b", legend))
        broken += [f"{source.name} {', '.join(unsaid)}"] if unsaid else []
    return all_of("files with shape suffixes that explain them", broken=broken, whole=total)


def _names(tree: ast.Module) -> set[str]:
    """Arguments and lower-case local names; constants and classes have no suffix."""
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    return {name for name in names if name[:1].islower() or (name[:1] == "_" and name[1:2].islower())}


def _criteria(library: Sequence[Source]) -> Measured:
    """Each criterion cites where it is from and says the unit of its score."""
    broken, total = [], 0
    for source in library:
        if not source.name.startswith("lightning_moe/criteria/"):
            continue
        for name, node in _public_functions(source):
            first = next(arguments(node), None)
            if ast.unparse(node.returns) not in _SCORES or first is None or first.arg not in {"statistics", "model"}:
                continue
            if any(arg.arg == "formula" for arg in arguments(node)):  # the formula is the caller's
                continue
            total += 1
            text = ast.get_docstring(node) or ""
            gaps = [] if _UNIT.search(text) else ["unit"]
            gaps += [] if re.search(r"arXiv|[Mm]ethod|[Pp]aper|[Ss]ource", text) else ["source"]
            broken += [source.at(node, f"{name}: {', '.join(gaps)}")] if gaps else []
    return all_of("criteria that cite a source and say a unit", broken=broken, whole=total)


def _positional(library: Sequence[Source]) -> Measured:
    """Public functions of public modules take one positional argument, and what they calculate with: tensors.

    Methods follow the signatures of what they stand in for, and are not counted. Shown, not judged: `write(path,
    content)` reads well.
    """
    many, total = [], 0
    for source in library:
        if source.path.stem.startswith("_"):
            continue
        for name, node in _public_functions(source):
            if "." in name:
                continue
            total += 1
            plain = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args) if not _SUFFIX.search(arg.arg)]
            many += [source.at(node, f"{name}: {', '.join(plain)}")] if len(plain) > 1 else []
    value = percent(total - len(many), total)
    name = "public functions with at most one positional argument"
    return Measured(name=name, value=value, target="shown", holds=True, offenders=tuple(many))
