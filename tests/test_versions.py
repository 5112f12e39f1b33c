"""The import stops with one line where a library is missing or too old, and asks for nothing that it does not use."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from lightning_moe import __version__, versions
from lightning_moe.versions import ANY_VERSION, MINIMUM, check_versions, release

ROOT = Path(versions.__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCES = sorted(path for package in ("lightning_moe", "callbacks") for path in (ROOT / package).rglob("*.py"))
# Import name -> the extra that brings it.
OPTIONAL = {"lm_eval": "eval", "evaluate": "eval"}


def names_and_versions(requirements):
    """(name, oldest version or None) of each requirement."""
    for requirement in requirements:
        match = re.fullmatch(r"([\w-]+)(?:\[[\w,]+\])?(?:>=([\d.]+))?", requirement)
        assert match, requirement
        yield match.groups()


def imports(path, *, at_import):
    """Modules that a file imports: when it is imported itself, or anywhere in it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if at_import else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def fake(monkeypatch, **found):
    """Makes libraries appear in these versions; None: they are missing."""
    installed = versions.version

    def version(name):
        if name in found and found[name] is None:
            raise PackageNotFoundError(name)
        return found.get(name) or installed(name)

    monkeypatch.setattr(versions, "version", version)


def test_the_tables_are_those_of_the_project_file():
    needed = dict(names_and_versions(PROJECT["dependencies"]))
    assert {name: oldest for name, oldest in needed.items() if oldest is not None} == MINIMUM
    others = {name for name, oldest in needed.items() if oldest is None}
    assert {name for name in ANY_VERSION.values() if "[" not in name} == others
    extras = [name for name in ANY_VERSION.values() if "[" in name]
    assert all(any(asked.startswith(f"{name}>=") for asked in PROJECT["dependencies"]) for name in extras)


def test_everything_imported_is_asked_for_and_nothing_else():
    roots = {module.split(".")[0] for path in SOURCES for module in imports(path, at_import=False)}
    roots -= {"lightning_moe", "callbacks"} | set(OPTIONAL) | sys.stdlib_module_names
    asked = {module for module, name in ANY_VERSION.items() if "[" not in name}  # an extra is for another library
    assert roots == set(MINIMUM) | asked


def test_what_is_optional_is_imported_when_it_is_used():
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in SOURCES}
    users = {
        name
        for name, path in modules.items()
        if {module.split(".")[0] for module in imports(path, at_import=True)} & set(OPTIONAL)
    }
    assert users
    for name, path in modules.items():
        if name not in users:
            assert not users & set(imports(path, at_import=True)), f"{name} needs an extra to be imported"


def test_optional_packages_have_an_extra():
    extras = PROJECT["optional-dependencies"]
    assert set(OPTIONAL.values()) <= set(extras)
    assert "lm_eval" in dict(names_and_versions(extras["eval"]))


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"peft": "0.19.1"}, r"^lightning_moe needs peft 0\.20 or newer \(installed: 0\.19\.1\)\. .*'peft>=0\.20'$"),
        (
            {"bitsandbytes": None},
            r"bitsandbytes 0\.50 or newer \(not installed\)\. .* install 'bitsandbytes>=0\.50'$",
        ),
        (
            {"torch": "2.9.1+cu128", "numpy": None},
            r"torch 2\.10 .*\(installed: 2\.9\.1\+cu128\), numpy .* install 'torch>=2\.10' 'numpy>=2\.0'$",
        ),
    ],
)
def test_what_is_too_old_or_missing_is_said_in_one_line(monkeypatch, found, expected):
    fake(monkeypatch, **found)
    with pytest.raises(ImportError, match=expected) as caught:
        check_versions()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("module", ANY_VERSION)
def test_small_libraries_that_are_missing_are_said_in_the_same_line(module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    name = re.escape(ANY_VERSION[module])
    with pytest.raises(ImportError, match=rf"^lightning_moe needs {name} \(not installed\)\. .* install '{name}'$"):
        check_versions()


def test_all_that_is_missing_is_in_one_line(monkeypatch):
    fake(monkeypatch, peft="0.19.1")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"0\.19\.1\), pillow \(not installed\)\. .* 'peft>=0\.20' 'pillow'$"):
        check_versions()


def test_folders_that_an_interrupted_installation_left_are_no_library(monkeypatch, tmp_path):
    (tmp_path / "half_removed" / "__pycache__").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(ANY_VERSION, "half_removed", "half-removed")
    with pytest.raises(ImportError, match=r"half-removed \(not installed\)"):
        check_versions()


@pytest.mark.parametrize("package", ["lightning_moe", "callbacks"])
@pytest.mark.parametrize("module", ["tqdm", "typing_extensions"])
def test_whichever_package_is_imported_first_says_it(package, module):
    program = f"import sys; sys.modules[{module!r}] = None; import {package}"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    needs = f"lightning_moe needs {module} (not installed). Install what is needed: pip install '{module}'"
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"ImportError: {needs}"


@pytest.mark.parametrize("found", ["2.10", "2.10.0", "2.10.0a0+git1a2b3c", "2.11.0+cpu", "10.0"])
def test_builds_of_the_oldest_version_and_newer_ones_pass(monkeypatch, found):
    fake(monkeypatch, torch=found)
    check_versions()


def test_a_program_ends_with_the_line_alone(monkeypatch):
    fake(monkeypatch, lightning="2.5.6")
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/lightning-moe"])
    with pytest.raises(SystemExit, match=r"^lightning_moe needs lightning 2\.6 or newer \(installed: 2\.5\.6\)"):
        check_versions()


def test_nothing_heavy_is_imported_before_the_check(tmp_path):
    """A real process in which PEFT is too old: no traceback, and no torch."""
    (tmp_path / "peft-0.1.dist-info").mkdir()
    (tmp_path / "peft-0.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.1\n")
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    done = subprocess.run(
        [sys.executable, "-m", "lightning_moe", "plan"],
        cwd=tmp_path,
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [
        "lightning_moe needs peft 0.20 or newer (installed: 0.1). Install what is needed: pip install 'peft>=0.20'"
    ]


def test_what_an_interrupted_installation_leaves_is_no_version(monkeypatch, tmp_path):
    (tmp_path / "psutil-7.0.dist-info").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r"psutil 5\.9\.5 or newer \(installed: unknown\)"):
        check_versions()


def test_release():
    assert release("5.20.2") == (5, 20, 2)
    assert release("2.6") == release("2.6.0") == (2, 6)
    assert release("unknown") == ()
    assert release("0.9") < release("0.20")


def test_the_version_is_said_once():
    assert PROJECT["dynamic"] == ["version"]
    assert release(__version__)
