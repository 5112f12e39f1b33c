"""After a power cut a name holds the old file or the new one: data are flushed before the rename, names after it."""

import ast
import errno
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import tiny_model

from lightning_moe import renaming
from lightning_moe.export.deploy import export_model
from lightning_moe.export.folders import open_folder
from lightning_moe.export.streaming import prune_folder
from lightning_moe.files import write_atomically, write_json
from lightning_moe.training.checkpoint_writing import WholeCheckpoints

ROOT = Path(renaming.__file__).parents[1]


class Disk:
    """What reached it, in order: (what happened, number of the file or folder, its size)."""

    def __init__(self):
        self.events = []

    def note(self, what, path_or_descriptor):
        found = os.stat(path_or_descriptor)
        self.events.append((what, found.st_ino, None if stat.S_ISDIR(found.st_mode) else found.st_size))

    def of(self, what, path):
        """The event that a file or folder, as it is now, has been part of."""
        found = os.stat(path)
        return (what, found.st_ino, None if path.is_dir() else found.st_size)


@pytest.fixture
def disk(monkeypatch):
    disk, real = Disk(), {name: getattr(os, name) for name in ("fsync", "replace")}
    exchange, rmtree = renaming.exchange, shutil.rmtree

    def fsync(descriptor):
        disk.note("flush", descriptor)
        real["fsync"](descriptor)

    def replace(source, target):
        disk.note("rename", source)
        real["replace"](source, target)

    def exchanged(first, second):
        disk.note("rename", first)
        return exchange(first, second)

    def removed(path, *args, **options):
        disk.note("remove", path)
        rmtree(path, *args, **options)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(renaming, "exchange", exchanged)
    monkeypatch.setattr(shutil, "rmtree", removed)
    return disk


def by_python(path):
    with write_atomically(path) as temporary:
        temporary.write_text("some text")


def by_rust(path):
    with write_atomically(path) as temporary:
        save_file({"a": torch.ones(9)}, temporary)


def by_torch(path):
    WholeCheckpoints().save_checkpoint({"step": 1}, path)


@pytest.mark.parametrize("write", [by_python, by_rust, by_torch])
@pytest.mark.parametrize("older", [False, True])
def test_a_file_is_on_the_disk_before_it_has_its_name_and_then_the_name_is(write, older, disk, tmp_path):
    path = tmp_path / "file"
    if older:
        path.write_text("older")
    write(path)
    assert disk.events == [disk.of("flush", path), disk.of("rename", path), disk.of("flush", tmp_path)]


@pytest.mark.parametrize("in_one_step", [True, False])
def test_a_folder_is_on_the_disk_before_it_replaces_another_which_goes_last(in_one_step, disk, monkeypatch, tmp_path):
    path, new = tmp_path / "model", tmp_path / "work" / "model"
    for folder in (path / "deep", new / "deep"):
        folder.mkdir(parents=True)
        (folder / "weights").write_text(str(folder))
        (folder.parent / "config").write_text("{}")
    if not in_one_step:
        monkeypatch.setattr(renaming, "exchange", lambda first, second: False)
    old = path.stat().st_ino
    renaming.move_into_place(new, path)
    named = len(disk.events) - 1 - disk.events[::-1].index(disk.of("rename", path))
    for file in (path, path / "deep", path / "deep" / "weights", path / "config"):
        assert disk.events.index(disk.of("flush", file)) < named
    assert disk.events.index(disk.of("flush", tmp_path)) > named
    assert disk.events[-1] == ("remove", old, None)
    assert disk.events[-2] == disk.of("flush", tmp_path)


def test_folders_that_were_not_there_are_found_again(disk, tmp_path):
    write_json(tmp_path / "a" / "b" / "plan.json", {})
    made = [disk.of("flush", tmp_path), disk.of("flush", tmp_path / "a")]
    assert sorted(disk.events[:2]) == sorted(made)
    assert disk.events[-1] == disk.of("flush", tmp_path / "a" / "b")
    disk.events.clear()
    write_json(tmp_path / "a" / "b" / "plan.json", {})
    assert not set(made) & set(disk.events)


def files_of(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def check_flushed(disk, folder):
    """Every file reached the disk as it is now, under whatever name it had then."""
    files = files_of(folder)
    assert len(files) >= 4
    assert [path.name for path in files if disk.of("flush", path) not in disk.events] == []
    for inside in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        assert disk.of("flush", inside) in disk.events
    assert disk.of("flush", folder.parent) in disk.events


def test_every_file_of_an_export_is_on_the_disk(disk, tmp_path):
    for _ in range(2):  # the second replaces the first
        disk.events.clear()
        export_model(tiny_model(), folder=tmp_path / "out", formats=["stock", "nf4"])
        for name in ("stock", "nf4"):
            check_flushed(disk, tmp_path / "out" / name)


def test_every_file_of_a_folder_that_was_written_layer_by_layer_is_on_the_disk(disk, tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    source = open_folder(str(tmp_path / "model"))
    prune_folder(source, plan=None, out=tmp_path / "new" / "out", quantize=True, progress=False)
    check_flushed(disk, tmp_path / "new" / "out")
    assert disk.of("flush", tmp_path) in disk.events


def refusing(monkeypatch, number, *, folders):
    fsync = os.fsync

    def refuse(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == folders:
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_systems_that_flush_no_folders_are_borne(number, monkeypatch, tmp_path):
    refusing(monkeypatch, number, folders=True)
    write_json(tmp_path / "new" / "plan.json", 1)
    assert (tmp_path / "new" / "plan.json").read_text() == "1\n"


def test_folders_that_cannot_be_opened_are_borne(monkeypatch, tmp_path):
    opened = os.open

    def refuse(path, *args, **options):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, *args, **options)

    monkeypatch.setattr(os, "open", refuse)
    write_json(tmp_path / "new" / "plan.json", 1)
    assert (tmp_path / "new" / "plan.json").read_text() == "1\n"


def test_a_disk_that_breaks_at_a_folder_is_told(monkeypatch, tmp_path):
    refusing(monkeypatch, errno.EIO, folders=True)
    with pytest.raises(OSError, match=r"Input/output error: '.*plan\.json'"):
        write_json(tmp_path / "plan.json", 1)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_file_that_the_disk_does_not_take_gets_no_name(number, monkeypatch, tmp_path):
    """Where room is found late, a full disk is told by the flush and not by the write."""
    write_json(tmp_path / "plan.json", "old")
    refusing(monkeypatch, number, folders=False)
    with pytest.raises(OSError, match=rf"{os.strerror(number)}: '.*/plan\.json'"):
        write_json(tmp_path / "plan.json", "new")
    assert (tmp_path / "plan.json").read_text() == '"old"\n'
    assert os.listdir(tmp_path) == ["plan.json"]
    with pytest.raises(ValueError, match=rf"checkpoint '.*last\.ckpt' cannot be written: {os.strerror(number)}\."):
        WholeCheckpoints().save_checkpoint({"step": 1}, tmp_path / "last.ckpt")


def test_files_of_a_user_who_gives_nobody_a_right_to_read_are_flushed_too(disk, tmp_path):
    mask = os.umask(0o777)
    try:
        with write_atomically(tmp_path / "plan.json") as temporary:
            temporary.touch()
            temporary.chmod(0o600)
    finally:
        os.umask(mask)
    assert (tmp_path / "plan.json").stat().st_mode & 0o777 == 0
    assert disk.of("flush", tmp_path / "plan.json") in disk.events


def renames(call):
    """Whether a call gives a file another name: `os.replace(a, b)`, `path.replace(b)`, `path.rename(b)` and so on."""
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
        return False
    name, of = call.func.attr, ast.unparse(call.func.value)
    return name in ("rename", "renames", "move") or (name == "replace" and (of == "os" or len(call.args) == 1))


def test_nothing_takes_its_final_name_elsewhere():
    """So that no other place has to know of all this."""
    sources = [path for package in ("lightning_moe", "callbacks") for path in (ROOT / package).rglob("*.py")]
    found = {path.name for path in sources if any(map(renames, ast.walk(ast.parse(path.read_text(encoding="utf-8")))))}
    assert found == {"renaming.py"}
