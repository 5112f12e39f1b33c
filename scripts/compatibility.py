"""Tries the oldest and the newest supported versions of the libraries: an environment each, and a short decisive test.

    python scripts/compatibility.py --quick                 # torch as in constraints.txt: small downloads
    python scripts/compatibility.py --json versions.json    # torch too: two CUDA builds of about 3 GB each

Rows: `pinned` (scripts/constraints.txt), `oldest` (the bounds in pyproject.toml), `newest` (whatever pip finds), and,
with torch as it is pinned, `oldest_libraries` and `newest_libraries`. An environment takes 2 to 7 GB of disk and is
removed after its row. The tests go through calibration, cut, repair, NF4, a DoRA step, schedule, resume, streaming,
export and the command line, on tiny models of every family. Where settings of pip (index, constraints) cap a version,
they cap `newest` too. Exit code 1 when a row failed.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parents[1]
SHOWN = ("torch", "transformers", "peft", "bitsandbytes", "lightning")
TEST_TOOLS = ("pytest>=8", "hypothesis>=6.100")
TESTS = (
    "tests/test_versions.py",
    "tests/test_private_apis.py",
    "tests/test_calibration_exact.py",
    "tests/test_pipeline.py",
    "tests/test_nf4.py",
    "tests/test_dora.py",
    "tests/test_schedule_callbacks.py",
    "tests/test_callbacks_resume.py",
    "tests/test_resume_batches.py",
    "tests/test_resume_cli.py",
    "tests/test_folders_ragged.py",
    "tests/test_prune_streamed.py",
    "tests/test_stock_config.py",
    "tests/test_deploy.py",
    "tests/test_cli.py::test_the_stages_alone_from_files",
)
QUICK = ("oldest_libraries", "newest_libraries")
FULL = ("pinned", "oldest", "newest")
_REQUIREMENT = re.compile(r"([\w-]+)(\[[\w,]+\])?(?:[>=]=([\w.+]+))?")
_COUNTS = re.compile(r"(\d+) (passed|failed|errors?|skipped)")


@dataclass(kw_only=True)
class Row:
    """What came of one environment.

    Args:
        name: one of `QUICK` and `FULL`.
        versions: distribution -> installed version.
        passed: tests that passed.
        failed: tests that failed or could not be run.
        note: why there is no result, or the first failure.
    """

    name: str
    versions: dict[str, str] = field(default_factory=dict)
    passed: int = 0
    failed: int = 0
    note: str = ""

    @property
    def good(self) -> bool:
        """Whether tests ran and all of them passed."""
        return self.passed > 0 and not self.failed and not self.note


def requirements(row: str) -> list[str]:
    """What pip is asked for.

    Raises:
        ValueError: there is no row of this name.
    """
    if row not in (*QUICK, *FULL):
        raise ValueError(f"There is no row {row!r}. Rows: {', '.join((*QUICK, *FULL))}.")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "scripts" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {name: version for name, _, version in map(_split, lines) if version}
    asked: list[str] = []
    for name, extras, oldest in map(_split, project["dependencies"]):
        version = pinned.get(name, "") if row == "pinned" or (name == "torch" and row in QUICK) else ""
        version = oldest if not version and row.startswith("oldest") else version
        asked.append(f"{name}{extras}=={version}" if version else f"{name}{extras}")
    return asked


def _split(line: str) -> tuple[str, str, str]:
    """Name, extras and version of a line such as `name[extra]>=1.2`; empty where it is a comment."""
    match = _REQUIREMENT.fullmatch(line)
    return ("", "", "") if match is None else (match[1], match[2] or "", match[3] or "")


def try_row(name: str, *, work: Path, bar: tqdm) -> Row:
    """Makes an environment, installs, runs the tests; what pip and pytest said lies in `work`."""
    row, folder = Row(name=name), work / name
    venv.create(folder, with_pip=True, clear=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    try:
        bar.set_postfix_str(f"{name}: install")
        pip = [python, "-m", "pip", "install", "--no-compile", "--no-cache-dir", *requirements(name), *TEST_TOOLS]
        if _run(pip, log=work / f"{name}_install.txt"):
            errors = [line for line in _text(work / f"{name}_install.txt").splitlines() if line.startswith("ERROR")]
            row.note = f"pip: {(errors or ['failed'])[-1]}"
            return row
        row.versions = _versions(python)
        bar.update()
        bar.set_postfix_str(f"{name}: tests")
        code = _run([python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS], log=work / f"{name}_tests.txt")
        _read_result(row, _text(work / f"{name}_tests.txt"), code=code)
        bar.update()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return row


def _run(command: list[object], *, log: Path) -> int:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("PYTHONPATH", None)
    with log.open("w", encoding="utf-8") as file:
        arguments = [str(part) for part in command]
        return subprocess.run(arguments, cwd=ROOT, env=environment, stdout=file, stderr=file, check=False).returncode


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _versions(python: Path) -> dict[str, str]:
    names = [name for name, _, _ in map(_split, requirements("newest"))]
    program = (
        f"import json; from importlib.metadata import version; print(json.dumps({{n: version(n) for n in {names!r}}}))"
    )
    return json.loads(subprocess.run([str(python), "-c", program], capture_output=True, text=True, check=True).stdout)


def _read_result(row: Row, text: str, *, code: int) -> None:
    counts = {kind.rstrip("s"): int(number) for number, kind in _COUNTS.findall(text.rstrip().rpartition("\n")[2])}
    row.passed = counts.get("passed", 0)
    row.failed = counts.get("failed", 0) + counts.get("error", 0)
    if code:
        failures = [line for line in text.splitlines() if line.startswith(("FAILED", "ERROR", "E   "))]
        row.note = (failures or [f"pytest ended with code {code}"])[0]


def table(rows: list[Row]) -> str:
    """The rows in Markdown, and below them what went wrong."""
    lines = [f"| row | {' | '.join(SHOWN)} | tests passed | failed |", "|---|" + "---|" * (len(SHOWN) + 2)]
    for row in rows:
        versions = " | ".join(row.versions.get(name, "?") for name in SHOWN)
        lines.append(f"| {row.name} | {versions} | {row.passed} | {row.failed} |")
    return "\n".join([*lines, *(f"{row.name}: {row.note}" for row in rows if row.note)])


def main() -> None:
    """Runs the rows and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"rows {', '.join(QUICK)}; else {', '.join(FULL)}")
    parser.add_argument("--only", nargs="+", choices=(*QUICK, *FULL), help="these rows alone")
    parser.add_argument("--json", type=Path, help="file for all rows, with every version")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "compatibility", help="folder for environments")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    names = options.only or (QUICK if options.quick else FULL)
    rows: list[Row] = []
    with tqdm(total=2 * len(names), desc="versions") as bar:
        for name in names:
            rows.append(try_row(name, work=options.work, bar=bar))
            if options.json is not None:
                options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    print(table(rows))
    sys.exit(0 if all(row.good for row in rows) else 1)


if __name__ == "__main__":
    main()
