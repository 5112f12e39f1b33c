"""A disk that is full from the start or fills up on the way, and a folder that cannot be written to."""

import ctypes
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

from faults.cases import Case, CaseFolder, Outcome, completed, disturbed, either, place, refused, shares
from faults.places import at_place
from faults.processes import Ended, exit_code, start_function
from faults.stages import STAGES

from lightning_moe import cli

_NEW_USER, _NEW_MOUNTS, _PRIVATE = 0x10000000, 0x00020000, 0x44000  # CLONE_NEWUSER, CLONE_NEWNS, MS_REC | MS_PRIVATE
_DISK_BYTES = 256 * 2**20
_BALLAST = ".ballast"
_CAPABILITIES = 0x20080522  # _LINUX_CAPABILITY_VERSION_3


def mount_small_disk(folder: Path, *, num_bytes: int) -> None:
    """Mounts a tmpfs on a folder, for this process and its children only.

    Raises:
        OSError: this user may not do so here.
    """
    libc, user, group = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()
    if libc.unshare(_NEW_MOUNTS if user == 0 else _NEW_USER | _NEW_MOUNTS):
        raise OSError(ctypes.get_errno(), "unshare")
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    libc.mount(b"none", b"/", None, _PRIVATE, None)
    size = f"size={num_bytes}".encode()
    if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, size):
        raise OSError(ctypes.get_errno(), "mount")


@cache
def can_mount() -> bool:
    """Whether this machine lets us mount a small disk."""
    return start_function(lambda: mount_small_disk(Path.cwd(), num_bytes=2**20), folder=Path("/tmp")).end().code == 0


def how_a_disk_is_full() -> str:
    """For the report."""
    if can_mount():
        return "a tmpfs in a mount namespace, filled up by a file of somebody else"
    return "no new byte in any file (RLIMIT_FSIZE of 0): this machine does not let us mount a small disk"


def _on_small_disk(folder: CaseFolder, install: Callable[[], None]) -> None:
    """In the child: the command with `out` on a disk of its own; what it leaves there is copied back."""
    out, kept = folder.path / "out", folder.path / "out.kept"
    mount_small_disk(out, num_bytes=_DISK_BYTES)
    shutil.copytree(kept, out, dirs_exist_ok=True)
    child = os.fork()
    if child == 0:
        install()
        os._exit(exit_code(lambda: cli.main(list(folder.stage.arguments))))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    (out / _BALLAST).unlink(missing_ok=True)
    shutil.rmtree(kept)
    shutil.copytree(out, kept)
    sys.exit(code)


def _fill(*_: object) -> None:
    """Somebody else takes the rest of the disk."""
    with open("out/.ballast", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(2**16))
        except OSError:
            return


def _no_more_bytes(*_: object) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def _full_at(share: float, folder: CaseFolder) -> Outcome:
    """The disk fills up right before a change on it."""
    number = place(folder, share)
    if not can_mount():
        return disturbed(folder, expects=either(refused(), completed), child=at_place(number, _no_more_bytes))
    runner = partial(_run_on_small_disk, folder, at_place(number, _fill))
    return disturbed(folder, expects=either(refused(), completed), runner=runner)


def _full(folder: CaseFolder) -> Outcome:
    """The disk is full before the command begins."""
    if not can_mount():
        return disturbed(folder, expects=refused(), child=_no_more_bytes)
    return disturbed(folder, expects=refused(), runner=partial(_run_on_small_disk, folder, _fill))


def _run_on_small_disk(folder: CaseFolder, install: Callable[[], None]) -> Ended:
    out, kept = folder.path / "out", folder.path / "out.kept"
    out.rename(kept)
    out.mkdir()
    ended = start_function(partial(_on_small_disk, folder, install), folder=folder.path).end(limit_s=folder.limit_s)
    out.rmdir()
    kept.rename(out)
    return ended


def drop_capabilities() -> None:
    """From now on permissions of files hold for root too."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES, 0)
    ctypes.CDLL(None, use_errno=True).capset(header, (ctypes.c_uint32 * 6)())


@cache
def can_forbid() -> bool:
    """Whether a folder can be made read-only for a child of ours."""

    def try_it() -> None:
        folder = Path(f"/tmp/.read_only_{os.getpid()}")
        folder.mkdir(mode=0o500)
        try:
            drop_capabilities()
            (folder / "file").write_text("")
        except PermissionError:
            return
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        sys.exit(1)

    return start_function(try_it, folder=Path("/tmp")).end().code == 0


def _read_only(folder: CaseFolder) -> Outcome:
    """`out` and the folders in it."""
    return disturbed(
        folder,
        spoil=lambda path: _permit(path, mode=0o555),
        remedy=lambda path: _permit(path, mode=0o755),
        child=drop_capabilities,
        expects=refused("out/"),
    )


def _permit(path: Path, *, mode: int) -> None:
    for folder in [path / "out", *(one for one in (path / "out").rglob("*") if one.is_dir())]:
        folder.chmod(mode)


def _cases() -> list[Case]:
    made = []
    for stage in STAGES:
        made.append(Case(name="from the start", stage=stage, fault="full disk", run=_full))
        made.append(Case(name="out", stage=stage, fault="read-only folder", run=_read_only))
        for share, quick in shares(2 if stage == "recover" else 3, 24):
            run = partial(_full_at, share)
            made.append(Case(name=f"at {share:.3f}", stage=stage, fault="full disk", quick=quick, run=run))
    return made


CASES: list[Case] = _cases()
