"""What the words of the pages refer to: other pages, anchors, files."""

import fnmatch
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from docs_pages import ROOT, blocks, pages, prose

TOPS = ("lightning_moe", "callbacks", "configs", "scripts", "tests")

_HEADING = re.compile(r"^#+ (.*)$", flags=re.MULTILINE)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"`([^`\n]+)`")
_FILE = re.compile(
    rf"({'|'.join(TOPS)})/[\w.*/{{}},-]+|[\w.*/{{}},-]+\.(py|sh|yaml|md|txt|jinja|jsonl?|csv|html|png|safetensors|ckpt|pt)"
)
# Folders that a command writes.
_WRITTEN = re.compile(r"(runs|OUT|NAME)\b")


def anchors(page: Path) -> set[str]:
    """What `#...` may say of a page, by GitHub's rule: lower case, spaces to hyphens, other signs left out."""
    text = re.sub(r"^( *)```.*?^\1```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in _HEADING.findall(text)}


def links(page: Path) -> list[str]:
    """Targets of the links of a page."""
    return _LINK.findall(prose(page))


def code(page: Path) -> list[str]:
    """What stands between backticks in the text of a page, tables included."""
    return [part.replace("\\|", "|") for part in _CODE.findall(prose(page))]


def named_files(page: Path) -> Iterator[str]:
    """Paths in the code of the text: words that begin with a folder of ours, or end as files do."""
    for part in code(page):
        for word in re.split(r"[\s;()'\"]+", part):
            if _FILE.fullmatch(word) and not _WRITTEN.match(word):
                yield word


def exists(name: str, *, page: Path) -> bool:
    """Whether a path, or all that its braces stand for, lies below the root or the page, or is written by us."""
    return all(_found(single, page=page) for single in alternatives(name))


def _found(name: str, *, page: Path) -> bool:
    pattern = name.replace("NAME", "*").rstrip("/")
    if any(any(base.glob(pattern)) for base in (ROOT, page.parent)):
        return True
    if name.startswith(TOPS):
        return False
    last = Path(pattern).name
    return bool(fnmatch.filter(_file_names(), last)) or last in _sources() or name in _blocks()


@cache
def _file_names() -> frozenset[str]:
    return frozenset(file.name for top in TOPS for file in (ROOT / top).rglob("*.*"))


@cache
def _sources() -> str:
    """The library, which says by what names it writes files."""
    files = (file for top in ("lightning_moe", "callbacks") for file in (ROOT / top).rglob("*.py"))
    return "".join(file.read_text(encoding="utf-8") for file in files)


@cache
def _blocks() -> str:
    """All blocks, which say by what names a user has files."""
    return "".join(block.text + str(block.says) for page in pages() for block in blocks(page))


def alternatives(name: str) -> list[str]:
    braces = re.search(r"\{([^{}]*)\}", name)
    if not braces:
        return [name]
    around = name[: braces.start()], name[braces.end() :]
    return [whole for choice in braces[1].split(",") for whole in alternatives(choice.join(around))]
