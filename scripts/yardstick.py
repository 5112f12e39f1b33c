"""Measures the code against the project's bounds and prints a table; exit code 1 where a bound is broken.

Lengths of files and functions, annotations, docstrings with shapes and units, raised messages and their tests,
guessing, repeated blocks, names that nothing reads, the size of the tests, configs with results. It reads the files and
runs nothing: layers are shown by `tests/test_layers.py`, types by pyright, and what resumes, is cut or is merged alike
by tests of their own. Lengths of functions are without docstrings; where that hides something, the figure with them
stands beside it.

    python scripts/yardstick.py [--offenders 5] [--json FILE]
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from measures.habits import measure_habits
from measures.lengths import measure_files, measure_functions
from measures.raises import measure_raises
from measures.repeats import measure_repeats
from measures.signatures import measure_signatures
from measures.source import BESIDE, LIBRARY, Measured, read_sources
from measures.unread import measure_unread


def measure() -> list[Measured]:
    """Every line of the table."""
    library, beside = read_sources(*LIBRARY), read_sources(*BESIDE)
    tests = [source for source in beside if source.name.startswith("tests/")]
    return [
        *measure_files(library, beside=beside),
        *measure_functions(library, beside=beside),
        *measure_signatures(library),
        *measure_raises(library, tests=tests),
        *measure_habits(library, tests=tests),
        *measure_repeats(library, beside=beside),
        *measure_unread(library),
    ]


def table(rows: Sequence[Measured], *, offenders: int) -> str:
    """The rows, and below each that is broken the first places that break it."""
    width = max(len(row.name) for row in rows)
    value = max(len(row.value) for row in rows)
    lines = []
    for row in rows:
        lines.append(f"{'ok    ' if row.holds else 'BROKEN'}  {row.name:<{width}}  {row.value:>{value}}  {row.target}")
        places = [] if row.holds else row.offenders
        lines += [f"          {place}" for place in places[:offenders]]
        lines += [f"          and {len(places) - offenders} more"] if len(places) > offenders else []
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints.

    Returns:
        1 where a bound is broken, else 0.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--offenders", type=int, default=5, help="places named below a broken row (default: 5)")
    parser.add_argument("--json", type=Path, help="also write the rows, with every place, to this file")
    settings = parser.parse_args(argv)
    rows = measure()
    print(table(rows, offenders=settings.offenders))
    if settings.json is not None:
        settings.json.write_text(json.dumps([asdict(row) for row in rows], indent=2), encoding="utf-8")
    return 0 if all(row.holds for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
