"""Nothing is written over what is read."""

import os
from collections.abc import Iterable
from pathlib import Path

from lightning_moe.assets import resolve_asset


def check_apart(
    out: str | Path, *, inputs: Iterable[str | Path | None], name: str = "out", within: bool = True
) -> None:
    """Refuses to write over what is read, however it is spelled: with links, `..`, or a slash at the end.

    Args:
        out: file or folder that will be written or replaced as a whole.
        inputs: what is read: files, folders, assets; names on the hub and None are left aside.
        name: of the argument that gave `out`.
        within: also refuse a place inside a folder that is read.

    Raises:
        ValueError: `out` is one of them, contains one, or is inside of one.
    """
    target = Path(os.path.realpath(Path(out).expanduser()))  # unlike resolve(), no error for links in a circle
    for given in inputs:
        path = None if given is None else Path(resolve_asset(str(given))).expanduser()
        if path is None or not path.exists():
            continue
        source = Path(os.path.realpath(path))
        inside = within and source.is_dir() and source in target.parents
        if target == source or target in source.parents or inside:
            where = "is" if target == source else "is inside" if inside else "contains"
            raise ValueError(
                f"`{name}` '{out}' {where} '{given}', which is read and would be overwritten. Name another place."
            )
