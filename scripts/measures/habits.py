"""What the code never does, how much is tested, and configs that carry their results."""

import ast
import re
from collections.abc import Iterator, Sequence

from measures.source import ROOT, Measured, Source, all_of, none_of

ASSERTS_PER_100 = 8
_NEVER_CALLED = {"print", "breakpoint", "basicConfig"}
_NEVER_IMPORTED = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}


def measure_habits(library: Sequence[Source], *, tests: Sequence[Source]) -> list[Measured]:
    """Guessing, printing, pickle and broad handlers in the library; the size of the tests; configs with results."""
    below = [source for source in library if source.path.name != "cli.py"]
    return [
        none_of("guesses: hasattr, getattr with a default", found=_found(library, _guesses)),
        _looked_up(library),
        none_of("print, pickle, basicConfig below the command line", found=_found(below, _never)),
        none_of("handlers of every exception", found=_found(library, _broad)),
        *_tests(library, tests=tests),
        _configs(),
    ]


def _found(sources: Sequence[Source], find) -> list[str]:
    return [source.at(node, ast.unparse(node)[:70]) for source in sources for node in find(source.tree)]


def _guesses(tree: ast.Module) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (ast.unparse(node.func), len(node.args)) in {("hasattr", 2), ("getattr", 3)}:
            yield node


def _looked_up(library: Sequence[Source]) -> Measured:
    """`vars(x).get(name)` is a guess where our own tables could say it: shown, not judged, since configs are given."""
    found = _found(library, _defaults)
    name = "look-ups in vars() with a default"
    return Measured(name=name, value=str(len(found)), target="shown", holds=True, offenders=tuple(found))


def _defaults(tree: ast.Module) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            found = re.match(r"(vars\(.*\)|[\w.]+\.__dict__)\.(get|pop)$", ast.unparse(node.func))
            if found is not None and (found[2] == "get" or len(node.args) > 1):
                yield node


def _never(tree: ast.Module) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in _NEVER_CALLED:
            yield node
        if isinstance(node, ast.Import | ast.ImportFrom) and _imported(node) & _NEVER_IMPORTED:
            yield node
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Unpickler":  # as it is, not with a `find_class`
            yield node


def _imported(node: ast.Import | ast.ImportFrom) -> set[str]:
    """Top-level names of what is imported; of pickle, its errors may be caught, and its `Unpickler` restricted."""
    if isinstance(node, ast.Import):
        return {alias.name.split(".")[0] for alias in node.names}
    harmless = all(alias.name.endswith("Error") or alias.name == "Unpickler" for alias in node.names)
    return set() if harmless else {(node.module or "").split(".")[0]}


def _broad(tree: ast.Module) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            caught = [] if node.type is None else re.findall(r"\w+", ast.unparse(node.type))
            if not caught or {"Exception", "BaseException"} & set(caught):
                yield node.type or node


def _tests(library: Sequence[Source], *, tests: Sequence[Source]) -> list[Measured]:
    lines, code = (sum(len(source.lines) for source in sources) for sources in (tests, library))
    asserts = sum(_proves(node) for source in tests for node in ast.walk(source.tree))
    per_100 = 100 * asserts / lines
    return [
        Measured(
            name="lines of tests to lines of library", value=f"{lines} : {code}", target=">= 1", holds=lines >= code
        ),
        Measured(
            name="asserts per 100 lines of tests",
            value=f"{per_100:.1f} ({asserts})",
            target=f">= {ASSERTS_PER_100}",
            holds=per_100 >= ASSERTS_PER_100,
        ),
    ]


def _proves(node: ast.AST) -> bool:
    """`assert`, `assert_close` and its kin, `pytest.raises`."""
    if isinstance(node, ast.Assert):
        return True
    return isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in {"assert_close", "raises", "warns"}


def _configs() -> Measured:
    """Each config is named in the table of `configs/README.md`, with what was measured with it."""
    page = (ROOT / "configs" / "README.md").read_text(encoding="utf-8")
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in page.splitlines() if line.startswith("|")]
    named = {row[0] for row in rows if len(row) == 3 and row[-1].strip()}
    covered = {name for cell in named for quoted in re.findall(r"`([^`]+)`", cell) for name in _expanded(quoted)}
    configs = sorted(path.relative_to(ROOT / "configs").as_posix() for path in (ROOT / "configs").rglob("*.yaml"))
    missing = [name for name in configs if name not in covered and f"{name.split('/')[0]}/*.yaml" not in covered]
    return all_of("configs with a row of what they gave", broken=missing, whole=len(configs))


def _expanded(name: str) -> list[str]:
    """`paper_{a,b}.yaml` as two names; `quickstart*.yaml` stays."""
    found = re.search(r"\{([^}]*)\}", name)
    if found is None:
        return [name]
    return [full for choice in found[1].split(",") for full in _expanded(name.replace(found[0], choice, 1))]
