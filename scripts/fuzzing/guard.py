"""Reads a damaged sample under watch: no code from it runs, nothing outside is opened, no large allocation, no hang."""

import os
import resource
import signal
import site
import sys
import sysconfig
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

# What reading may take beyond what the process had; the samples are some 100 KB.
MEMORY_BYTES = 512 * 2**20
SECONDS = 20
_PAGE = os.sysconf("SC_PAGE_SIZE")
# Acts that reading data never needs, by the beginning of the audit event's name.
_FORBIDDEN = (
    "pickle.find_class",
    "subprocess.",
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "socket.",
    "urllib.",
    "ftplib.",
    "http.",
    "webbrowser.",
    "ctypes.dlopen",
)
# Which argument of an event is the open folder that its path counts from.
_FOLDER_ARGUMENT = {"os.remove": 1, "os.rmdir": 1, "os.rename": 2, "os.mkdir": 2, "os.chmod": 2}
_CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
_INSTALLED = {*sysconfig.get_paths().values(), *site.getsitepackages(), sys.prefix, sys.base_prefix}
_SYSTEM = ("/proc", "/sys", "/dev/null", "/dev/urandom", "/etc/localtime", "/usr/share/zoneinfo")
_LIBRARIES = (*map(os.path.realpath, _INSTALLED), *_SYSTEM)
_SOURCES = (os.path.realpath(Path(__file__).parents[2]),)


class TooSlowError(BaseException):
    """Reading took longer than `SECONDS`."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of one case.

    Args:
        kind: `read`, `refused`, or `finding`.
        what: of a finding, what is wrong with it; of a refusal, the message.
        where: of a finding, the innermost place in our own code.
    """

    kind: str
    what: str = ""
    where: str = ""


class _Watch:
    """Collects forbidden acts while it is `folder`'s turn."""

    def __init__(self) -> None:
        self.folder: str | None = None
        self.acts: list[str] = []
        self.allowed: tuple[str, ...] = ()

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        folder, self.folder = self.folder, None  # what we do here is not watched
        try:
            act = self._judge(event, arguments, folder)
            if act:
                self.acts.append(act)
        finally:
            self.folder = folder

    def _judge(self, event: str, arguments: tuple[Any, ...], folder: str) -> str:
        if event == "open":
            return self._judge_open(*arguments, folder=folder)
        if event in ("exec", "compile"):
            return _judge_code(event, arguments, folder)
        if event.startswith(_CHANGES) and not _is_inside(_place(event, arguments), (folder,)):
            return f"{event} {arguments}"
        if event == "ctypes.dlopen" and arguments[0] is None:
            return ""
        return f"{event} {arguments!r:.200}" if event.startswith(_FORBIDDEN) else ""

    def _judge_open(self, path: object, mode: object, flags: object, *, folder: str) -> str:
        if isinstance(path, int) or _is_inside(path, (folder, *self.allowed)):
            return ""
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not writes and _is_inside(path, (*_LIBRARIES, *_SOURCES)):
            return ""
        return f"opened {path!r} ({mode})"


def _place(event: str, arguments: tuple[Any, ...]) -> object:
    """Where a change is made: a name may count from an open folder."""
    folder = arguments[_FOLDER_ARGUMENT[event]] if event in _FOLDER_ARGUMENT else -1
    if isinstance(folder, int) and folder >= 0 and isinstance(arguments[0], str):
        return os.path.join(os.readlink(f"/proc/self/fd/{folder}"), arguments[0])
    return arguments[0]


def _is_inside(path: object, roots: tuple[str, ...]) -> bool:
    if not isinstance(path, str | bytes | os.PathLike):
        return False
    text = os.path.realpath(os.fsdecode(path)) if b"\0" not in os.fsencode(path) else ""
    return any(text == root or text.startswith(f"{root}/") for root in roots)


def _judge_code(event: str, arguments: tuple[Any, ...], folder: str) -> str:
    """Modules of installed libraries may be imported meanwhile; anything else that becomes code came from the data."""
    code = arguments[0] if event == "exec" else None
    name = code.co_filename if isinstance(code, CodeType) else arguments[-1]
    name = os.fsdecode(name) if isinstance(name, str | bytes) else ""
    if folder in name or "transformers_modules" in name:
        return f"{event} of {name}"
    if event == "compile" and name == "<unknown>":  # `ast.parse`, for the marks in tracebacks: it is not run
        return ""
    known = name.startswith("<frozen ") if name.startswith("<") else _is_inside(name, (*_LIBRARIES, *_SOURCES))
    if known or _called_by_library():
        return ""
    return f"{event} of {name or arguments!r:.200}"


def _called_by_library() -> bool:
    """Whether a class is being made at an import (dataclasses, named tuples): their source is not the data's."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        # jinja's sandbox makes code of a chat template, and bounds what it may do.
        if frame.f_code.co_filename.startswith("<frozen importlib") or "/jinja2/" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


_watch = _Watch()
sys.addaudithook(_watch)


def guarded(
    read: Callable[[Path], object],
    folder: Path,
    *,
    refusals: tuple[type[Exception], ...],
    allowed: tuple[str, ...] = (),
) -> Outcome:
    """Reads `folder` and judges what happened.

    Args:
        read: the reading function.
        folder: the sample.
        refusals: exceptions that are a refusal.
        allowed: further files and folders that may be opened.
    """
    folder = folder.resolve()
    before = _peak_bytes()
    error: BaseException | None = None
    _watch.acts.clear()
    _watch.allowed = allowed
    try:
        with _limits(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _watch.folder = str(folder)
            try:
                read(folder)
            finally:
                _watch.folder = None
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as caught:
        error = caught
    return _judged(error, refusals=refusals, folder=folder, grown=_peak_bytes() - before)


def _judged(error: BaseException | None, *, refusals: tuple[type[Exception], ...], folder: Path, grown: int) -> Outcome:
    where = _place_of(error)
    if _watch.acts:
        return Outcome(kind="finding", what=f"did something forbidden: {_watch.acts[0]}", where=where)
    if grown > MEMORY_BYTES:
        return Outcome(kind="finding", what=f"took {grown / 2**20:.0f} MiB", where=where)
    if error is None:
        return Outcome(kind="read")
    if isinstance(error, TooSlowError):
        return Outcome(kind="finding", what=f"took more than {SECONDS} seconds", where=where)
    if _is_lack_of_memory(error):
        return Outcome(kind="finding", what=f"asked for too much memory: {error!s:.300}", where=where)
    if not isinstance(error, refusals):
        return Outcome(kind="finding", what=f"{type(error).__name__}: {error!s:.300}", where=where)
    message = str(error)
    bare = isinstance(error, UnicodeError)  # it quotes the codec, not the file
    if bare or not any(mark in message for mark in ("'", "`", str(folder))):
        return Outcome(kind="finding", what=f"the refusal names no file or field: {message!r:.300}", where=where)
    if "\n" in message.strip():
        return Outcome(kind="finding", what=f"the refusal has several lines: {message!r:.300}", where=where)
    return Outcome(kind="refused", what=message)


def _is_lack_of_memory(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _place_of(error: BaseException | None) -> str:
    """The innermost line of our own packages in a traceback, and the innermost of all."""
    if error is None:
        return ""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename.startswith(_SOURCES) and "/.venv/" not in frame.filename]
    places = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in (*own[-1:], *frames[-1:])]
    return " <- ".join(dict.fromkeys(reversed(places)))


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def _limits() -> Iterator[None]:
    """Allocations beyond `MEMORY_BYTES` fail, and an alarm goes off after `SECONDS`."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * _PAGE
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, _alarm)
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY_BYTES, hard))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, handler)


def _alarm(signum: int, frame: FrameType | None) -> None:
    raise TooSlowError
