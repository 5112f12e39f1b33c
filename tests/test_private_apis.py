"""Private names of other libraries: each in one file of ours, and all of them on the page that lists them."""

import ast
import re
import sys
from pathlib import Path

import pytest
from private_names import OWN, Source, inherited_names, private_names, sources

import callbacks
import lightning_moe.cli  # noqa: F401  (imports everything that needs no extra)

ROOT = Path(callbacks.__file__).parents[1]
PAGE = ROOT / "lightning_moe" / "COMPATIBILITY.md"
ROW = re.compile(r"^\| `(_\w+)` \| (\w+) \| `([\w/.]+)` \| (.+) \|$", flags=re.MULTILINE)
LIBRARIES = {"Lightning", "torch", "transformers", "accelerate", "peft", "bitsandbytes", "datasets", "lm_eval"}


@pytest.fixture(scope="module")
def used():
    modules = [module for name, module in list(sys.modules.items()) if name.split(".")[0] in OWN]
    values = [value for module in modules for value in vars(module).values() if isinstance(value, type)]
    kinds = {kind for kind in values if kind.__module__.split(".")[0] in OWN}
    found = sources(ROOT)
    inherited = inherited_names(found, kinds)
    assert {
        "_apply",
        "_active_adapter",
        "_tied_weights_keys",
    } <= inherited  # of each kind: method, own value, class value
    return private_names(found, inherited=inherited)


def test_each_name_stands_in_one_file(used):
    assert {name: files for name, files in used.items() if len(files) > 1} == {}


def test_the_page_lists_them_all(used):
    rows = ROW.findall(PAGE.read_text(encoding="utf-8"))
    assert len(rows) == len({name for name, *_ in rows}) > 30
    assert {name: {file} for name, _, file, _ in rows} == used
    assert {library for _, library, _, _ in rows} <= LIBRARIES


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("from other._inner import name", {"_inner"}),
        ("from other import _name", {"_name"}),
        ("import other._inner.name", {"_inner"}),
        ("trainer.loop._loaders = 3", {"_loaders"}),
        ("vars(module)['_hook']", {"_hook"}),
        ("vars(module).get('_hook')", {"_hook"}),
        ("NAMES = ('_one', '_two', '_Three', '_FOUR_4')", {"_one", "_two", "_Three", "_FOUR_4"}),
        ("class A(B):\n @override\n def _read(self): super()._read()", {"_read"}),
        ("class A(B):\n def f(self): return self._inherited", {"_inherited"}),
        ("load(path, _quietly=True)", {"_quietly"}),
        # Names of our own.
        ("class A:\n def _f(self): self._x = self._f()\ndef g(a): return a._x", set()),
        ("from lightning_moe.files import _own", set()),
        ("text = name.removesuffix('_sum')", set()),
        ("point._replace(x=1)", set()),
        ("class A:\n _x: int\nA(_x=1)", set()),
        ("_, rest = pair; model.__dict__", set()),
    ],
)
def test_what_counts_as_private(text, expected):
    assert set(private_names([Source("a.py", ast.parse(text))])) == expected
