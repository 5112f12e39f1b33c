"""Runs generated programs against their tests, in place of the hub's `code_eval`: each in a process of its own.

That is no sandbox: a program can do whatever this user can. Hence nothing runs without an explicit flag.
"""

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import evaluate

SECONDS = 5.0


def passes(program: str, *, seconds: float = SECONDS) -> bool:
    """Whether a Python program ends without an error in time; alone in an empty folder, with an empty environment."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "program.py"
        file.write_text(program, encoding="utf-8", errors="replace")
        try:
            done = subprocess.run(
                [sys.executable, "-I", str(file)],
                cwd=folder,
                env={},
                timeout=seconds,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == 0


class PassAtOne:
    """What lm_eval's code tasks expect of `evaluate.load("code_eval")`, for one prediction an item."""

    def compute(
        self, *, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int]
    ) -> tuple[dict[str, float], None]:
        """The share of items whose first prediction passes its test; only `k` = [1]."""
        assert list(k) == [1]
        passed = [passes(f"{own[0]}\n{test}\n") for own, test in zip(predictions, references, strict=True)]
        return {"pass@1": sum(passed) / len(passed)}, None


@contextmanager
def local_code_eval() -> Iterator[None]:
    """While lm_eval's code tasks are loaded inside the block, they get `PassAtOne` and not the hub's metric."""

    def load(_name: str, *_args: Any, **_kwargs: Any) -> PassAtOne:
        return PassAtOne()

    hub_load = evaluate.load
    evaluate.load = load  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        evaluate.load = hub_load
