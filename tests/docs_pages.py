"""The pages of the documentation, and their fenced blocks with what the comment before each says.

A comment directly before a block, invisible on the rendered page, is one of

    <!-- not run: REASON -->                  rarely: a GPU, minutes, the hub
    <!-- run on: PAGE -->                     the same lines stand there, and run
    <!-- run with: BEGINNING + FLAGS; ... --> these flags go behind lines that begin so (after `lightning_moe`)
    <!-- first: COMMAND; ... -->              what the page takes for granted
    <!-- file: NAME -->                       the block is written to this file, for the commands after it
    <!-- read by: SUBCOMMAND FLAGS -->        YAML: parsed by that command, as its last `--config`
    <!-- lines of: FILE -->                   Python: lines of a program that a test runs whole

A block without a language is a picture or a program's output.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
KINDS = ("not run", "run on", "run with", "first", "file", "read by", "lines of")

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)$")
_COMMENT = re.compile(r"^ *<!-- (?P<kind>[a-z ]+): (?P<text>.*) -->$")


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block; `line` is that of its fence."""

    page: Path
    line: int
    language: str
    text: str
    says: dict[str, str] = field(default_factory=dict)

    @property
    def place(self) -> str:
        """Where a reader finds it."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def pages() -> list[Path]:
    """Every page of the repository."""
    below = [*(ROOT / "lightning_moe").rglob("*.md"), *(ROOT / "callbacks").glob("*.md")]
    return sorted([*ROOT.glob("*.md"), *(ROOT / "configs").rglob("*.md"), *(ROOT / "scripts").rglob("*.md"), *below])


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    lines = page.read_text(encoding="utf-8").splitlines()
    start, language, indent, says = None, "", "", {}
    for number, line in enumerate(lines):
        fence = _FENCE.match(line)
        assert fence or not line.lstrip().startswith(("```", "~~~")), (
            f"{page}:{number + 1}: not a plain fence: {line!r}"
        )
        if start is None and fence:
            start, language, indent = number, fence["language"], fence["indent"]
            says = _comments_above(lines, number)
        elif start is not None and line == f"{indent}```":
            text = "".join(f"{inside.removeprefix(indent)}\n" for inside in lines[start + 1 : number])
            yield Block(page=page, line=start + 1, language=language, text=text, says=says)
            start = None
    assert start is None, f"{page}: the block that begins in line {start} has no end"


def prose(page: Path) -> str:
    """The page without its blocks and comments."""
    text = re.sub(r"^( *)```.*?^\1```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)


def _comments_above(lines: list[str], number: int) -> dict[str, str]:
    """By kind; those of one kind in the order of the page, joined."""
    says: dict[str, str] = {}
    for line in reversed(lines[:number]):
        comment = _COMMENT.match(line)
        if not comment:
            break
        kind, text = comment["kind"], comment["text"]
        assert kind in KINDS, f"unknown comment {line!r}: one of {KINDS}"
        says[kind] = f"{text}; {says[kind]}" if kind in says else text
    return says
