"""The script that tries other versions: what it asks pip for, and how it reads what came of it."""

import subprocess
import tomllib
from pathlib import Path

import compatibility
import pytest
from compatibility import FULL, QUICK, Row, requirements, table, try_row

from lightning_moe.versions import MINIMUM

ROOT = Path(compatibility.__file__).parents[1]


class NoBar:
    """Takes the place of a progress bar."""

    def update(self):
        pass

    def set_postfix_str(self, text):
        pass


def versions_of(row):
    pairs = (requirement.partition("==") for requirement in requirements(row))
    return {name.partition("[")[0]: version for name, _, version in pairs}


def test_the_rows_are_the_bounds_the_newest_and_the_pinned_versions():
    assert {name: version for name, version in versions_of("oldest").items() if version} == MINIMUM
    assert set(versions_of("newest").values()) == {""}
    pinned = versions_of("pinned")
    assert {name for name, version in pinned.items() if version} >= {*compatibility.SHOWN, "accelerate", "datasets"}
    for row in QUICK:
        # Everything but torch is as in the row without the suffix.
        assert versions_of(row) == versions_of(row.removesuffix("_libraries")) | {"torch": pinned["torch"]}
    assert "jsonargparse[signatures]==4.43" in requirements("oldest")
    with pytest.raises(ValueError, match=r"There is no row 'middle'\. Rows: oldest_libraries, "):
        requirements("middle")


def test_every_dependency_is_asked_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for row in (*QUICK, *FULL):
        assert len(requirements(row)) == len(project["dependencies"])


def test_the_tests_it_runs_exist():
    for test in compatibility.TESTS:
        path, _, name = test.partition("::")
        assert f"def {name}" in (ROOT / path).read_text()


@pytest.mark.parametrize(
    ("printed", "code", "expected"),
    [
        ("...\n12 passed in 3.10s\n", 0, (12, 0, "", True)),
        ("..\n12 passed, 1 skipped, 2 deselected in 3s\n", 0, (12, 0, "", True)),
        ("E   x\nFAILED a::b - no\nERROR c\n1 failed, 11 passed, 2 errors in 3s\n", 1, (11, 3, "E   x", False)),
        ("ImportError\n", 4, (0, 0, "pytest ended with code 4", False)),
        ("no tests ran in 0.01s\n", 0, (0, 0, "", False)),
    ],
)
def test_what_pytest_says_is_counted(printed, code, expected):
    row = Row(name="oldest")
    compatibility._read_result(row, printed, code=code)
    assert (row.passed, row.failed, row.note, row.good) == expected


def test_a_row_that_cannot_be_installed_is_said_and_its_environment_removed(tmp_path, monkeypatch):
    def run(command, *, stdout, **_):
        stdout.write("Collecting torch\nERROR: No matching distribution found for torch==0.0\n")
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(compatibility.venv, "create", lambda folder, **_: folder.mkdir())
    monkeypatch.setattr(compatibility.subprocess, "run", run)
    row = try_row("oldest", work=tmp_path, bar=NoBar())
    assert (row.good, row.note) == (False, "pip: ERROR: No matching distribution found for torch==0.0")
    assert [path.name for path in tmp_path.iterdir()] == ["oldest_install.txt"]
    assert table([row]).splitlines()[-2:] == ["| oldest | ? | ? | ? | ? | ? | 0 | 0 |", f"oldest: {row.note}"]
