"""Stops the import, with one line, where a library is missing or older than what this package was tested with.

Nothing but the standard library is imported here: this runs before everything else.
"""

import re
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from lightning_moe.signals import is_program

# Distribution -> oldest version, as in `pyproject.toml` (a test compares them). `scripts/compatibility.py` tries them.
MINIMUM = {
    "torch": "2.10",
    "lightning": "2.6",
    "transformers": "5.21",
    "accelerate": "1.10",
    "peft": "0.20",
    "bitsandbytes": "0.50",
    "torchmetrics": "1.8",
    "datasets": "4.0",
    "jsonargparse": "4.43",
    "matplotlib": "3.9",
    "psutil": "5.9.5",
    "safetensors": "0.8",
    "numpy": "2.0",
}
# Module -> what pip calls it: imported here too, in whichever version those above ask for.
ANY_VERSION = {
    "fsspec": "fsspec",
    "huggingface_hub": "huggingface_hub",
    "jinja2": "jinja2",
    "PIL": "pillow",
    "pyarrow": "pyarrow",
    "yaml": "pyyaml",
    "tqdm": "tqdm",
    "typing_extensions": "typing_extensions",
    "docstring_parser": "jsonargparse[signatures]",  # which imports it where it reads a class of ours
}
_RELEASE = re.compile(r"\d+(?:\.\d+)*")


def check_versions() -> None:
    """Compares what is installed with `MINIMUM` and `ANY_VERSION`.

    Raises:
        ImportError: something is missing or too old; says what is there, what is needed, and the command that helps.
        SystemExit: the same, as the only line, where the package is run as a program.
    """
    problems = {f"{name}>={old}": told for name, old in MINIMUM.items() if (told := _problem(name, old)) is not None}
    problems |= {name: f"{name} (not installed)" for module, name in ANY_VERSION.items() if not _is_there(module)}
    if not problems:
        return
    needed = " ".join(f"'{requirement}'" for requirement in problems)
    message = f"lightning_moe needs {', '.join(problems.values())}. Install what is needed: pip install {needed}"
    if is_program():
        sys.exit(message)
    raise ImportError(message)


def _problem(name: str, needed: str) -> str | None:
    try:
        found = version(name) or "unknown"  # None where an interrupted installation left an empty folder
    except PackageNotFoundError:
        return f"{name} {needed} or newer (not installed)"
    return None if release(found) >= release(needed) else f"{name} {needed} or newer (installed: {found})"


def _is_there(module: str) -> bool:
    """Whether a module can be imported, and is not what an interrupted installation left: folders without a file."""
    found = find_spec(module)
    return found is not None and found.origin is not None


def release(text: str) -> tuple[int, ...]:
    """The numbers a version begins with, without zeros at the end; what follows them does not count.

    >>> release("2.13.0+cpu")
    (2, 13)
    >>> release("2.10.0a0+git1a2b3c") >= release("2.10")
    True
    """
    match = _RELEASE.match(text)
    numbers = [int(number) for number in match.group().split(".")] if match else []
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)
