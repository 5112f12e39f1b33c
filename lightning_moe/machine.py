"""What this process may take of the machine it runs on."""

import resource
from collections.abc import Iterator
from pathlib import Path

import psutil

_MOUNT = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")
_STATUS = Path("/proc/self/status")
# Of control groups of version 2 and 1: what limits memory, what is in use, and pages of files in it that can go.
_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def available_memory(*, mount: Path = _MOUNT, own: str | None = None) -> int:
    """Bytes of memory that this process can still take: the least that the machine and its limits leave.

    Limits are those of its control group and of every group around it (of a container, say), of version 2 or 1, and
    RLIMIT_AS and RLIMIT_DATA.

    Args:
        mount: where control groups are mounted.
        own: `/proc/self/cgroup`'s text; read where not given.
    """
    text = own if own is not None else _OWN.read_text(encoding="utf-8") if _OWN.is_file() else ""
    left = [psutil.virtual_memory().available, *_left_in_groups(mount, text=text), *_left_of_process()]
    return max(0, min(left))


def _left_in_groups(mount: Path, *, text: str) -> Iterator[int]:
    for line in text.splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            roots, files = (mount, mount / "unified"), _V2
        elif "memory" in controllers.split(","):
            roots, files = (mount / "memory",), _V1
        else:
            continue
        for root in roots:
            group = root / path.strip("/")
            # Inside a container the path may be the host's, and the container's own group the root.
            for folder in dict.fromkeys((*(one for one in (group, *group.parents) if one.is_relative_to(root)), root)):
                left = _left_in(folder, *files)
                if left is not None:
                    yield left


def _left_in(group: Path, limit: str, usage: str, cache: str) -> int | None:
    most, used = _number(group / limit), _number(group / usage)
    if most is None or used is None:
        return None
    try:
        words = (line.split() for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
        return most - used + next((int(value) for name, value in words if name == cache), 0)
    except OSError:
        return most - used


def _number(file: Path) -> int | None:
    """Of a file of a control group; None where there is none, or no limit (`max`)."""
    try:
        text = file.read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _left_of_process() -> Iterator[int]:
    used = _own_use()
    for kind, name in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        most = resource.getrlimit(kind)[0]
        if most != resource.RLIM_INFINITY and name in used:
            yield most - used[name]


def _own_use() -> dict[str, int]:
    """Bytes under their names in `/proc/self/status`."""
    if not _STATUS.is_file():
        return {}
    lines = (line.split() for line in _STATUS.read_text(encoding="utf-8").splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[2:] == ["kB"]}
