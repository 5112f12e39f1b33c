"""What lies on the disk: digests of files, whole outputs, and what a command left behind."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

# Hold the folder of the run, which is another one for each case.
_PLACES = ("source", "base_model", "folder", "base", "adapter")


def snapshot(folder: Path) -> dict[str, str]:
    """Path below `folder` -> digest of its bytes; of a folder "folder"; of a link where it leads to."""
    return {str(path.relative_to(folder)): _digest(path) for path in sorted(folder.rglob("*"))}


def contents(path: Path) -> dict[str, str]:
    """The same of one output, file or folder, as far as two equal runs agree: timings are left out."""
    if not path.exists():
        return {}
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path.parent)): _stable_digest(file) for file in files}


def is_whole(file: Path) -> bool:
    """Whether a file can be read to its end, as far as its kind tells."""
    try:
        if file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
        elif file.suffix == ".ckpt":
            torch.load(file, weights_only=True)
        elif file.suffix == ".safetensors":
            with safe_open(file, framework="pt"):
                pass
    except (ValueError, OSError, RuntimeError, EOFError, SafetensorError):
        return False
    return file.stat().st_size > 0


def copy(source: Path, target: Path) -> None:
    """A file or folder at another place; what was there goes first."""
    if target.is_dir():
        shutil.rmtree(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True)
    elif source.exists():
        shutil.copy2(source, target)


def _digest(path: Path) -> str:
    if path.is_symlink():
        return f"link to {path.readlink()}"
    if path.is_dir():
        return "folder"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no file"


def _stable_digest(file: Path) -> str:
    if file.suffix != ".json":
        return _digest(file)
    try:
        return repr(_stable(json.loads(file.read_text(encoding="utf-8"))))
    except ValueError:
        return _digest(file)


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        stable = {key: _stable(one) for key, one in value.items() if not key.startswith("seconds")}
        return {key: Path(one).name if key in _PLACES and isinstance(one, str) else one for key, one in stable.items()}
    return [_stable(one) for one in value] if isinstance(value, list) else value
