"""Runs generated programs against their tests, in place of the hub's `code_eval`: each in a process of its own.

That is no sandbox: a program can do whatever this user can. Hence nothing runs without an explicit flag.
"""

import secrets
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
    """Whether a Python program comes to its last line, and ends without an error in time.

    It runs alone in an empty folder, with an empty environment, and not as `__main__`, as if it was imported. What
    follows its last line leaves a file of a random name: a program that exits before does not pass.
    """
    with tempfile.TemporaryDirectory() as folder:
        file, reached = Path(folder) / "program.py", Path(folder) / secrets.token_hex()
        ending = f"\n__import__('pathlib').Path({str(reached)!r}).touch()\n"
        file.write_text(program + ending, encoding="utf-8", errors="replace")
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-c", f"import runpy; runpy.run_path({str(file)!r}, run_name='program')"],
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
        return done.returncode == 0 and reached.exists()


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
    """While lm_eval's code tasks are loaded inside the block, `code_eval` is `PassAtOne` and not the hub's metric."""
    hub_load: Any = evaluate.load

    def load(path: str, *args: Any, **kwargs: Any) -> Any:
        return PassAtOne() if path == "code_eval" else hub_load(path, *args, **kwargs)

    evaluate.load = load  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        evaluate.load = hub_load
