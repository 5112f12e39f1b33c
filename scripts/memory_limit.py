"""Runs commands in a limited amount of memory and measures what they take.

A control group (version 2 or 1) holds the process and what it starts to the limit, page cache included, where this user
may make one (root, as a rule). Elsewhere RLIMIT_DATA limits what a process may ask for, touched or not: stricter for
each process, and it leaves out mapped files and the page cache.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_MOUNT = Path("/sys/fs/cgroup")
_V2, _V1 = "memory.max", "memory.limit_in_bytes"
_ENTER = 'echo $$ > "$0" && exec "$@"'
_ULIMIT = 'ulimit -d "$0" && exec "$@"'
_POLL_SECONDS = 0.05


@dataclass(frozen=True, kw_only=True)
class Limit:
    """What goes before a command, so that it runs in limited memory.

    Args:
        prefix: the words.
        how: how it is limited, in words.
    """

    prefix: tuple[str, ...]
    how: str


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a command did.

    Args:
        code: its exit code; negative, or above 128: killed by that signal.
        seconds: wall clock.
        peak: most bytes of one of its processes in memory at once ("maximum resident set size"); 0 where it was killed.
        output: its standard output and error.
    """

    code: int
    seconds: float
    peak: int
    output: str


@contextmanager
def memory_limit(num_bytes: int, *, mount: Path = _MOUNT, own: str | None = None) -> Iterator[Limit]:
    """A limit for as long as the block runs.

    Args:
        num_bytes: the limit.
        mount: where control groups are mounted.
        own: `/proc/self/cgroup`'s text; read where not given.
    """
    text = Path("/proc/self/cgroup").read_text(encoding="utf-8") if own is None else own
    for parent, file in _parents(mount, text):
        group = parent / f"lightning_moe_{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            if (group / file).exists() and _write(group / file, str(num_bytes)):
                kind = "control group, version 2" if file == _V2 else "control group, version 1"
                yield Limit(prefix=("sh", "-c", _ENTER, str(group / "cgroup.procs")), how=kind)
                return
        finally:
            _remove(group)
    yield Limit(prefix=("sh", "-c", _ULIMIT, str(num_bytes // 1024)), how="RLIMIT_DATA of each process, page cache not")


def _parents(mount: Path, text: str) -> list[tuple[Path, str]]:
    """Groups of this process that may get a child, and the file that limits one: version 2's first."""
    found: list[tuple[Path, str]] = []
    for line in text.splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            found += [(root / path.strip("/"), _V2) for root in (mount, mount / "unified")]
        elif "memory" in controllers.split(","):
            found.append((mount / "memory" / path.strip("/"), _V1))
    return sorted((parent for parent in found if parent[0].is_dir()), key=lambda parent: parent[1] != _V2)


def _write(file: Path, text: str) -> bool:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError:
        return False
    return True


def _remove(group: Path) -> None:
    """The kernel needs a moment after the last process has gone."""
    for _ in range(100):
        try:
            group.rmdir()
        except OSError:
            time.sleep(_POLL_SECONDS)
        else:
            return


def run_measured(command: Sequence[str], *, limit: Limit, log: Path, stop: Callable[[], bool] = lambda: False) -> Run:
    """Runs a command under a limit and `/usr/bin/time -v`; kills it with SIGKILL once `stop()` is true.

    Args:
        command: words.
        limit: from `memory_limit`.
        log: file that takes its output.
        stop: asked twenty times a second.
    """
    times = log.with_suffix(".time")
    times.unlink(missing_ok=True)
    words = [*limit.prefix, "/usr/bin/time", "-v", "-o", str(times), *command]
    start = time.perf_counter()
    with log.open("wb") as file:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while process.poll() is None:
                if stop():
                    os.killpg(process.pid, signal.SIGKILL)
                time.sleep(_POLL_SECONDS)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    seconds = time.perf_counter() - start
    output = log.read_text(encoding="utf-8", errors="replace")
    return Run(code=process.returncode, seconds=seconds, peak=_peak(times), output=output)


def _peak(times: Path) -> int:
    if not times.is_file():
        return 0
    lines = times.read_text(encoding="utf-8").splitlines()
    return 1024 * next((int(line.rpartition(":")[2]) for line in lines if "Maximum resident set size" in line), 0)
