"""Runs the blocks of a page in a folder of its own, where every name that pages use exists.

`MODEL` is the shipped model, `FOLDER` a cut of it in 4 bit, `data.yaml` the README's, and the texts are a few shipped
documents. Nothing is replaced in a line; only what the comment before its block says is added to it.
"""

import json
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from docs_pages import ROOT, Block, blocks
from task_files import save_task_sets

from lightning_moe import cli
from lightning_moe.assets import asset_path
from lightning_moe.criteria import CHANNEL_CRITERIA, EXPERT_CRITERIA
from lightning_moe.evaluation.task_sets import FOLDER_VARIABLE
from lightning_moe.models.families import FAMILIES

TEXTS = ("train", "calibration", "heldout")
_PROGRAM = ["python", "-m", "lightning_moe"]


class ParseOnly(cli.CompressionCLI):
    """Stops after the parser."""

    def instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def make_workplace(folder: Path, *, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder, which becomes the working directory."""
    for name in ("configs", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "tests").mkdir()
    (folder / "tests" / "model_configs").symlink_to(ROOT / "tests" / "model_configs")
    shutil.copytree(asset_path("small_moe"), folder / "MODEL")
    (folder / "texts").mkdir()
    for index, name in enumerate(TEXTS):
        text = "".join(f"{json.dumps(document)}\n" for document in _documents(index))
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        (folder / "texts" / f"{name}.jsonl").write_text(text, encoding="utf-8")
    (folder / "data.yaml").write_text(_named_file("data.yaml"), encoding="utf-8")
    save_task_sets(folder / "tasks")
    monkeypatch.setenv(FOLDER_VARIABLE, str(folder / "tasks"))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["lightning_moe"])
    monkeypatch.syspath_prepend(folder)
    return folder


def _documents(index: int) -> list[dict[str, str]]:
    """Three of the shipped documents of one domain, others for each file."""
    lines = asset_path("text/glosses/recovery.jsonl").read_text(encoding="utf-8").splitlines()
    return [{"text": json.loads(line)["text"]} for line in lines[3 * index : 3 * index + 3]]


def _named_file(name: str) -> str:
    (block,) = (block for block in blocks(ROOT / "README.md") if block.says.get("file") == name)
    return block.text


def run_page(page: Path) -> dict[str, Any]:
    """All blocks of a page in the working directory; returns the names that its Python made."""
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page):
        run_block(block, names=names)
    return names


def run_block(block: Block, *, names: dict[str, Any]) -> None:
    """Runs one block, or checks it as its comment says."""
    for command in filter(None, block.says.get("first", "").split("; ")):
        run_line(command, added={})
    if "not run" in block.says or not block.language:
        return
    if "run on" in block.says:
        there = [line for other in blocks(ROOT / block.says["run on"]) for line in _commands(other)]
        assert all(line in there for line in _commands(block)), f"{block.place}: not on {block.says['run on']}"
        return
    if "file" in block.says:
        Path(block.says["file"]).write_text(block.text, encoding="utf-8")
        return  # what comes after it reads or runs it
    match block.language:
        case "bash":
            added = _added(block.says.get("run with", ""))
            used = set().union(*(run_line(line, added=added) for line in _joined(block.text)))
            assert set(added) <= used, f"{block.place}: no line begins with {set(added) - used}"
        case "python":
            run_python(block, names=names)
        case "yaml":
            read_yaml(block)
        case other:
            pytest.fail(f"{block.place}: `{other}` blocks are not run by anything. Use bash, python or yaml.")


def run_line(line: str, *, added: dict[str, list[str]]) -> set[str]:
    """One command in this process; returns the beginnings by which it got further flags."""
    words = shlex.split(line, comments=True)
    if not words:
        return set()
    own_file = words[0] == "python" and words[1] in _python_files()
    assert own_file or words[:3] == _PROGRAM, f"only `{' '.join(_PROGRAM)} ...` and files of the page: {line!r}"
    arguments = words[2:] if own_file else words[3:]
    begins = {begin for begin in added if arguments[: len(begin.split())] == begin.split()}
    arguments += [flag for begin in added if begin in begins for flag in added[begin]]
    if own_file:
        run_program(words[1], arguments=arguments)
    else:
        cli.main(arguments)
    return begins


def _python_files() -> list[str]:
    return [str(file) for file in Path().glob("*.py")]


def run_program(file: str, *, arguments: list[str]) -> None:
    """`python FILE ARGUMENTS`, without the seconds that a process takes to import the libraries."""
    with pytest.MonkeyPatch.context() as patch, own_tables():
        patch.setattr(sys, "argv", [file, *arguments])
        runpy.run_path(file, run_name="__main__")


@contextmanager
def own_tables() -> Iterator[None]:
    """What is registered inside is forgotten afterwards, as with the process."""
    tables: tuple[dict[str, Any], ...] = (FAMILIES, CHANNEL_CRITERIA, EXPERT_CRITERIA)
    before = [dict(table) for table in tables]
    try:
        yield
    finally:
        for table, content in zip(tables, before, strict=True):
            table.clear()
            table.update(content)
        for file in _python_files():
            sys.modules.pop(Path(file).stem, None)


def run_python(block: Block, *, names: dict[str, Any]) -> None:
    """The block with the names of the blocks before it, or compared with the program that it is from."""
    if "lines of" not in block.says:
        exec(compile(block.text, block.place, "exec"), names)
        return
    program = iter((ROOT / block.says["lines of"]).read_text(encoding="utf-8").splitlines())
    for line in filter(None, map(str.strip, block.text.splitlines())):
        assert line in map(str.strip, program), f"{block.place}: {block.says['lines of']} has no {line!r} there"


def read_yaml(block: Block) -> None:
    """Parses a config with the real command line and looks for every value of it in what came out."""
    command, *flags = shlex.split(block.says["read by"])
    file = Path("block.yaml")
    file.write_text(block.text, encoding="utf-8")
    arguments = [*flags, "--config", str(file)]
    if command in cli.COMMANDS:
        parsed = cli.command_parser(command).parse_args(arguments)
    else:
        with pytest.MonkeyPatch.context() as parse_only:
            parse_only.setattr(cli, "CompressionCLI", ParseOnly)
            parsed = cli.train([command, *arguments]).config[command]
    for key in yaml.safe_load(block.text):
        assert parsed[key] is not None, f"{block.place}: `{key}` is lost"


def _added(text: str) -> dict[str, list[str]]:
    """Further flags by how a line begins."""
    parts = (part.split(" + ") for part in text.split("; ") if part)
    return {begin: shlex.split(flags) for begin, flags in parts}


def _commands(block: Block) -> list[list[str]]:
    """Words of each line, comments left out."""
    return [shlex.split(line, comments=True) for line in _joined(block.text)] if block.language == "bash" else []


def _joined(text: str) -> list[str]:
    return text.replace("\\\n", " ").splitlines()
