"""The examples of the docstrings, and that each module of plain calculations has one.

Examples see their module's names, `torch`, and two makers of records: `shape_of([4, 2])`, a model of one layer with two
experts of 4 and 2 channels, and `one_layer(widths=[4, 2], count=[7, 2])`, statistics of such a model that are 1 but for
those that are given.
"""

import doctest
import importlib
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from statistics_factory import hand_statistics, shape_of

import lightning_moe
from lightning_moe.records import CalibrationStatistics

pytestmark = pytest.mark.docs

ROOT = Path(lightning_moe.__file__).parent
# Their modules have no state, no files and no model: what goes in decides what comes out.
PURE_FOLDERS = ("criteria", "allocation", "records")
PURE_MODULES = (
    "adapters/functional",
    "commands/_parsers",
    "evaluation/compare/grid",
    "evaluation/windows",
    "failures",
    "models/grouped",
    "models/products",
    "quantization/nf4",
    "quantization/rounding",
    "quantization/stored",
    "reporting/checks",
    "reporting/comparison",
    "reporting/table",
    "reporting/words",
    "surgery/least_squares",
    "surgery/schedule",
    "training/losses",
    "training/packing",
    "training/router_loss",
    "training/settings",
)
# Searches and classes whose shortest example is a page, or that hold nothing but a protocol.
WITHOUT = {
    "allocation/budget_search": "a search over plans of a whole model",
    "allocation/budgets": "plans of a whole model",
    "allocation/uniform_sizes": "sizes of a whole model",
    "allocation/methods/base": "the protocol of a method",
}


def one_layer(*, widths: Sequence[int], **values: Sequence[float]) -> CalibrationStatistics:
    return hand_statistics(shape_of(widths), layers=[values])


def pure_modules() -> list[str]:
    below = [path for folder in PURE_FOLDERS for path in (ROOT / folder).rglob("*.py") if path.stem != "__init__"]
    return sorted({path.relative_to(ROOT).with_suffix("").as_posix() for path in below} | set(PURE_MODULES))


def examples(name: str) -> list[doctest.DocTest]:
    module = importlib.import_module("lightning_moe." + name.replace("/", "."))
    names = vars(module) | {"torch": torch, "shape_of": shape_of, "one_layer": one_layer}
    return [test for test in doctest.DocTestFinder().find(module, globs=names) if test.examples]


EVERY_MODULE = sorted(
    path.relative_to(ROOT).with_suffix("").as_posix() for path in ROOT.rglob("*.py") if ">>> " in path.read_text()
)


@pytest.mark.parametrize("name", EVERY_MODULE)
def test_examples_give_what_they_say(name):
    runner = doctest.DocTestRunner(optionflags=doctest.FAIL_FAST)
    told: list[str] = []
    for test in examples(name):
        runner.run(test, out=told.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(told)


@pytest.mark.parametrize("name", pure_modules())
def test_each_pure_module_has_an_example(name):
    assert bool(examples(name)) != (name in WITHOUT)


def test_a_wrong_example_would_be_found():
    test = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, None)
    told: list[str] = []
    assert doctest.DocTestRunner().run(test, out=told.append).failed == 1
    assert "Expected" in "".join(told)
