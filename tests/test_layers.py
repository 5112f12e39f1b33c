"""The import graph: lower layers never import higher ones, and Lightning stays at the top."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import lightning_moe

ROOT = Path(lightning_moe.__file__).parent
# Lowest first; layers of one row may import each other as long as there is no cycle.
ORDER: tuple[tuple[str, ...], ...] = (
    ("failures", "files", "locks", "machine", "progress", "renaming", "signals", "versions"),
    ("assets",),
    ("records",),
    ("models",),
    ("calibration", "criteria", "allocation", "quantization", "adapters"),
    ("surgery",),
    ("export", "evaluation", "reporting"),
    ("training",),
    ("callbacks",),
    ("commands", "cli", "__main__"),
)
RANK = {name: rank for rank, row in enumerate(ORDER) for name in row}
MAY_USE_LIGHTNING = {"training", "callbacks", "commands", "cli"}


def sources() -> Iterator[tuple[str, Path]]:
    """(layer, file) of every module of both packages; the package's own `__init__` only registers the format."""
    for file in sorted(ROOT.rglob("*.py")):
        layer = file.relative_to(ROOT).parts[0].removesuffix(".py")
        if layer != "__init__":
            yield layer, file
    for file in sorted((ROOT.parent / "callbacks").rglob("*.py")):
        yield "callbacks", file


def imported_modules(file: Path) -> Iterator[str]:
    """Full names of what a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer_of(module: str) -> str | None:
    """The layer that an imported module belongs to; None for other packages."""
    parts = module.split(".")
    if parts[0] == "callbacks":
        return "callbacks"
    return parts[1] if parts[0] == "lightning_moe" and len(parts) > 1 else None


def targets(file: Path) -> set[str]:
    """Layers that a file imports."""
    return {target for module in imported_modules(file) if (target := layer_of(module)) not in (None, "__version__")}


@pytest.mark.parametrize(("layer", "file"), sources(), ids=lambda value: getattr(value, "stem", value))
def test_nothing_imports_a_higher_layer(layer, file) -> None:
    for name in {layer} | targets(file):
        assert name in RANK, f"{file}: give the layer '{name}' a place in ORDER"
        assert RANK[name] <= RANK[layer], f"{file} ({layer}) imports the higher layer '{name}'"


def test_layers_have_no_cycle() -> None:
    graph: dict[str, set[str]] = {}
    for layer, file in sources():
        graph.setdefault(layer, set()).update(targets(file) - {layer})
    order = list(TopologicalSorter(graph).static_order())
    assert set(order) <= set(RANK)


def test_lightning_is_imported_at_the_top_only() -> None:
    for layer, file in sources():
        roots = {module.split(".")[0] for module in imported_modules(file)}
        used = roots & {"lightning", "pytorch_lightning", "lightning_fabric"}
        assert not used or layer in MAY_USE_LIGHTNING, f"{file} imports {used}"
