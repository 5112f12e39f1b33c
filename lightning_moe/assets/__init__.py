"""Files shipped with the package: the small model, its tokenizer and texts of five domains (licences: `README.md`)."""

from importlib import resources
from pathlib import Path, PurePosixPath

ASSET_PREFIX = "asset:"


def asset_path(name: str) -> Path:
    """Return the path of a shipped file or folder, such as `small_moe` or `text/code/heldout.jsonl`.

    Raises:
        ValueError: Nothing of this name is shipped, or it leads out of the package.
    """
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or not name.isprintable() or "\\" in name:
        raise ValueError(
            f"{ASSET_PREFIX}{name!r} leads out of the package: an asset is a shipped file or folder, without `..` or "
            "a leading slash. Name a file of yours without the prefix."
        )
    root = Path(str(resources.files(__name__)))
    path = root / name
    if not path.exists():
        shipped = ", ".join(
            sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("_"))
        )
        raise ValueError(
            f"No shipped file or folder is called {name!r}. Shipped folders: {shipped}; list one to see its files."
        )
    return path


def resolve_asset(path: str) -> str:
    """Replace the prefix `asset:` by the folder of shipped files; a path without it is returned as it is."""
    if not path.startswith(ASSET_PREFIX):
        return path
    return str(asset_path(path.removeprefix(ASSET_PREFIX)))
