"""The tables and lists of the pages name what the library has, all of it and nothing else."""

import re
from fnmatch import fnmatch
from itertools import chain
from pathlib import Path
from typing import get_args

import pytest
from docs_names import alternatives
from docs_pages import ROOT

from lightning_moe import cli
from lightning_moe.allocation import PRESETS
from lightning_moe.criteria import CHANNEL_CRITERIA, EXPERT_CRITERIA
from lightning_moe.export.formats import ExportFormat
from lightning_moe.models.families import FAMILIES, REFUSED
from lightning_moe.records.statistics import STATISTICS, WEIGHT_ABS_SUMS, WEIGHT_NORMS

pytestmark = pytest.mark.docs

README = ROOT / "README.md"
ALLOCATION = ROOT / "lightning_moe" / "allocation" / "README.md"


def rows(page: Path, *, header: str) -> list[list[str]]:
    """Cells of the table whose first cell says `header`, without the two lines of its head."""
    lines = page.read_text(encoding="utf-8").splitlines()
    (start,) = (number for number, line in enumerate(lines) if line.startswith(f"| {header} |"))
    table = [line for line in lines[start:] if line.startswith("|") or not line][2:]
    ends = table.index("") if "" in table else len(table)
    return [re.split(r"(?<!\\)\|", line)[1:-1] for line in table[:ends]]


def names(text: str) -> list[str]:
    """Words between backticks."""
    return re.findall(r"`([\w.]+)`", text)


def first_names(page: Path, *, header: str) -> list[str]:
    return list(chain.from_iterable(names(cells[0]) for cells in rows(page, header=header)))


def first_patterns(page: Path, *, header: str) -> list[str]:
    """Names of files in the first cells, braces written out."""
    cells = (cell for cell, *_ in rows(page, header=header))
    return [pattern for cell in cells for name in re.findall(r"`([^`]+)`", cell) for pattern in alternatives(name)]


def paragraph(page: Path, *, begins: str) -> str:
    """The paragraph that begins so."""
    parts = page.read_text(encoding="utf-8").split("\n\n")
    (found,) = (part for part in parts if part.startswith(begins))
    return found


def test_callbacks_and_their_groups():
    table = rows(ROOT / "callbacks" / "README.md", header="callback")
    assert [(names(cells[1])[0], names(cells[0])[0]) for cells in table] == list(cli.CALLBACK_GROUPS.items())


def test_methods():
    table = [name for name in first_names(ALLOCATION, header="name") if name not in ("seed", "scope", "global")]
    assert sorted(table) == sorted(set(PRESETS) - {"expert_dropping", "channel_ranking"})
    assert set(names(paragraph(README, begins="`--method exact_global`"))) <= set(PRESETS)


@pytest.mark.parametrize(("header", "criteria"), [("channels", CHANNEL_CRITERIA), ("experts", EXPERT_CRITERIA)])
def test_criteria(header, criteria):
    assert sorted(first_names(ALLOCATION, header=header)) == sorted(criteria)


def test_what_a_criterion_may_read():
    page = ROOT / "lightning_moe" / "criteria" / "README.md"
    assert sorted(first_names(page, header="name")) == sorted(STATISTICS)
    assert set(WEIGHT_NORMS) | set(WEIGHT_ABS_SUMS) <= set(names(paragraph(page, begins="`weights` has")))
    letters = {
        name: cells[1].strip().replace(" x ", "") for cells in rows(page, header="name") for name in names(cells[0])
    }
    for name in ("gate_sq", "weighted_sq", "channel_ablation", "count", "sq_norm", "attribution", "loss_taylor"):
        assert letters[name] == STATISTICS[name].dims


def test_export_formats():
    table = first_names(ROOT / "lightning_moe" / "export" / "README.md", header="format")
    assert sorted(table) == sorted(get_args(ExportFormat))


def test_families():
    told, _, refused = paragraph(README, begins="`qwen2_moe`").partition("`gpt_oss`")
    assert {name for name in names(told) if "." not in name} == set(FAMILIES)
    refused_names = {"gpt_oss", *names(refused)}
    assert {name.removesuffix("_text") for name in REFUSED} <= refused_names


def test_subcommands():
    text = README.read_text(encoding="utf-8")
    for command in (*cli.COMMANDS, "fit"):
        assert f"python -m lightning_moe {command} " in text, command


def test_configs():
    told = first_patterns(ROOT / "configs" / "README.md", header="config | what it does")
    files = [str(file.relative_to(ROOT / "configs")) for file in (ROOT / "configs").rglob("*.yaml")]
    assert [file for file in files if not any(fnmatch(file, pattern) for pattern in told)] == []
    assert [pattern for pattern in told if not any(fnmatch(file, pattern) for file in files)] == []


def test_programs():
    told = first_patterns(ROOT / "scripts" / "README.md", header="program")
    scripts = ROOT / "scripts"
    files = [str(file.relative_to(scripts)) for top in ("", "examples/") for file in scripts.glob(f"{top}*.[ps][yh]")]
    assert [file for file in files if not any(fnmatch(file, pattern) for pattern in told)] == ["venv.sh"]
    assert [pattern for pattern in told if not any(fnmatch(file, pattern) for file in files)] == []


def test_folders():
    told = re.findall(r"`([\w/]+)`", " ".join(cells[0] for cells in rows(README, header="folder")))
    inside = {folder.name for folder in (ROOT / "lightning_moe").iterdir() if (folder / "__init__.py").exists()}
    assert inside <= {name.removeprefix("lightning_moe/") for name in told}
    assert {"callbacks", "scripts", "configs"} <= set(told)
