"""Finished folders take their names in one step, killed runs leave nothing behind, and two runs do not mix."""

import errno
import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from tiny_runs import ForeignModule, loader_of, quiet_trainer, token_batches

from callbacks import ExportPruned
from lightning_moe import renaming
from lightning_moe.export import streamed
from lightning_moe.export.deploy import export_model
from lightning_moe.export.folders import open_folder
from lightning_moe.export.place import made_beside
from lightning_moe.export.streaming import prune_folder
from lightning_moe.files import write_atomically, write_json

pytestmark = pytest.mark.fault

# Holds the lock of a file until it is told to end.
HOLDER = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"


def folder_of(path, text):
    path.mkdir(parents=True)
    (path / "config.json").write_text(text)
    return path


def content(path):
    return {file.name: file.read_text() for file in path.iterdir()}


@pytest.fixture(params=["one step", "two steps"])
def steps(request, monkeypatch):
    if request.param == "two steps":
        monkeypatch.setattr(renaming, "exchange", lambda first, second: False)


def test_a_folder_takes_the_place_of_another(steps, tmp_path):
    new, old = folder_of(tmp_path / "work" / "m", "new"), folder_of(tmp_path / "m", "old")
    folder_of(tmp_path / "work" / "m.old", "older")  # of a run that was killed
    folder_of(tmp_path / "work" / ".m.whole.tmp", "older")
    renaming.move_into_place(new, old)
    assert content(old) == {"config.json": "new"}
    assert set(os.listdir(tmp_path / "work")) <= {"m.old"}


def test_the_system_exchanges_folders(tmp_path):
    one, other = folder_of(tmp_path / "one", "1"), folder_of(tmp_path / "other", "2")
    if not renaming.exchange(one, other):
        pytest.skip("no RENAME_EXCHANGE on this file system")
    assert (content(one), content(other)) == ({"config.json": "2"}, {"config.json": "1"})
    assert not renaming.exchange(one, tmp_path / "nothing")
    assert content(one) == {"config.json": "2"}


def test_the_final_name_is_never_free(tmp_path, monkeypatch):
    """At each rename the name holds the old folder or the new one."""
    new, old = folder_of(tmp_path / "work" / "m", "new"), folder_of(tmp_path / "m", "old")
    if not renaming.exchange(new, new.parent / "m"):
        pytest.skip("no RENAME_EXCHANGE on this file system")
    seen, replace = [], os.replace

    def watched(*paths):
        seen.append(content(old)["config.json"])
        replace(*paths)
        seen.append(content(old)["config.json"])

    monkeypatch.setattr(os, "replace", watched)
    monkeypatch.setattr(renaming.shutil, "rmtree", lambda path: seen.append(content(old)["config.json"]))
    renaming.move_into_place(new, old)
    assert seen == ["old", "old", "new"]


def test_both_folders_stay_where_the_disk_refuses(tmp_path, monkeypatch):
    new, old = folder_of(tmp_path / "work" / "m", "new"), folder_of(tmp_path / "m", "old")
    replace = os.replace

    def refusing(source, target):
        if target == old and ".whole" in source.name:
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(renaming, "exchange", lambda first, second: False)
    monkeypatch.setattr(os, "replace", refusing)
    with pytest.raises(OSError, match="Input/output"):
        renaming.move_into_place(new, old)
    assert (content(old), content(new)) == ({"config.json": "old"}, {"config.json": "new"})


def test_an_older_folder_comes_back(tmp_path):
    folder_of(tmp_path / "work" / "m-1.5b.old", "old")
    renaming.bring_back(tmp_path / "work" / "m-1.5b", tmp_path / "m-1.5b")
    assert content(tmp_path / "m-1.5b") == {"config.json": "old"}
    folder_of(tmp_path / "work" / "m-1.5b.old", "older")
    renaming.bring_back(tmp_path / "work" / "m-1.5b", tmp_path / "m-1.5b")
    assert content(tmp_path / "m-1.5b") == {"config.json": "old"}


def test_what_dead_processes_left_is_removed(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    path = tmp_path / "a.json"
    own = renaming.temporary_path(path).name
    dead = own.replace(f".{os.getpid()}.", f".{gone.pid}.")
    alive = own.replace(f".{os.getpid()}.", f".{os.getppid()}.")
    elsewhere = dead.replace(dead.split(".")[3], "00000000")
    other = dead.replace(".a.json.", ".b.json.")
    for name in (dead, alive, elsewhere, other):
        (tmp_path / name).write_text("half")
    write_json(path, 1)
    assert set(os.listdir(tmp_path)) == {"a.json", alive, elsewhere, other}
    folder_of(tmp_path / dead, "half")
    with write_atomically(path) as temporary:
        temporary.write_text("2")
    assert dead not in os.listdir(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks")
def test_two_exports_at_once_do_not_mix(tmp_path):
    (tmp_path / "nf4.unfinished").mkdir()
    lock = tmp_path / "nf4.unfinished" / ".lock"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(lock)], **pipes) as holder:
        holder.stdout.readline()
        (tmp_path / "nf4.unfinished" / "nf4").mkdir()
        with pytest.raises(ValueError, match=r"Another run is writing the export '.*nf4'\. Wait for it"):
            made_beside(tmp_path / "nf4").__enter__()
        assert set(os.listdir(tmp_path / "nf4.unfinished")) == {".lock", "nf4"}
        holder.communicate(b"\n")
    with made_beside(tmp_path / "nf4") as made:
        folder_of(made, "new")
    assert os.listdir(tmp_path) == ["nf4"]


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks")
def test_two_trainings_do_not_export_to_one_folder(tmp_path):
    (tmp_path / "exports").mkdir()
    exporting, data = ExportPruned(folder=str(tmp_path / "exports"), formats=["stock"]), token_batches(2)
    trainer = quiet_trainer([exporting], max_steps=1)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "exports" / ".run.lock")], **pipes) as holder:
        holder.stdout.readline()
        with pytest.raises(ValueError, match=r"Another run is going to export to '.*exports'\. Wait for it, or name"):
            trainer.fit(ForeignModule(), loader_of(data))
        holder.communicate(b"\n")
    trainer.fit(ForeignModule(), loader_of(data))
    assert os.listdir(tmp_path / "exports") == ["stock"]
    (tmp_path / "file").write_text("")
    trainer = quiet_trainer([ExportPruned(folder=str(tmp_path / "file" / "x"), formats=["stock"])], max_steps=1)
    with pytest.raises(ValueError, match=r"`folder` must be a folder that can be written to, got '.*file/x'"):
        trainer.fit(ForeignModule(), loader_of(data))


def test_a_streamed_export_has_its_name_when_it_was_compared(tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path / "stock")
    streamed.export_streamed(str(tmp_path / "stock"), folder=tmp_path / "out", progress=False)
    before = load_file(tmp_path / "out" / "nf4" / "model-00003-of-00003.safetensors")

    def sabotaged(*args, out, **settings):
        prune_folder(*args, out=out, **settings)
        file = out / "model-00003-of-00003.safetensors"
        save_file({name: value + 1 for name, value in load_file(file).items()}, file, metadata={"format": "pt"})

    monkeypatch.setattr(streamed, "prune_folder", sabotaged)
    with pytest.raises(ValueError, match=r"nf4\.unfinished/nf4' does not reproduce the model"):
        streamed.export_streamed(str(tmp_path / "stock"), folder=tmp_path / "out", progress=False)
    after = load_file(tmp_path / "out" / "nf4" / "model-00003-of-00003.safetensors")
    assert all(after[name].equal(before[name]) for name in before)
    monkeypatch.undo()
    streamed.export_streamed(str(tmp_path / "stock"), folder=tmp_path / "out", progress=False)
    assert os.listdir(tmp_path / "out") == ["nf4"]


def test_an_interrupted_streamed_export_goes_on_with_its_shards(tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path / "stock")

    def interrupted(*args, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_moe.export.partial.write_configs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        streamed.export_streamed(str(tmp_path / "stock"), folder=tmp_path / "out", progress=False)
    shard = tmp_path / "out" / "nf4.unfinished" / "nf4.partial" / "model" / "model-00001-of-00003.safetensors"
    os.utime(shard, ns=(1, 1))
    monkeypatch.undo()
    streamed.export_streamed(str(tmp_path / "stock"), folder=tmp_path / "out", progress=False)
    assert (tmp_path / "out" / "nf4" / shard.name).stat().st_mtime_ns == 1


@pytest.mark.parametrize("out", ["m", "m/new", "."])
def test_functions_too_never_replace_what_they_read(out, tmp_path):
    tiny_model().save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match="which is read and would be overwritten"):
        prune_folder(open_folder(str(tmp_path / "m")), plan=None, out=tmp_path / out, quantize=True)
    assert set(os.listdir(tmp_path)) == {"m"}


def test_an_export_never_replaces_its_source(tmp_path):
    tiny_model().save_pretrained(tmp_path / "nf4")
    with pytest.raises(ValueError, match=r"`folder` '.*nf4' is '.*nf4', which is read"):
        export_model(tiny_model(), folder=tmp_path, formats=["nf4"], source=str(tmp_path / "nf4"))
    with pytest.raises(ValueError, match=r"`folder` '.*nf4' is '.*nf4', which is read"):
        streamed.export_streamed(str(tmp_path / "nf4"), folder=tmp_path)


def test_a_folder_of_another_run_is_refused_before_the_cost_is_told(tmp_path, caplog):
    tiny_model().save_pretrained(tmp_path / "m")
    (tmp_path / "out.partial").mkdir()
    write_json(tmp_path / "out.partial" / "run.json", {"command": "prune"})
    with caplog.at_level("INFO"), pytest.raises(ValueError, match="was left by another run"):
        prune_folder(open_folder(str(tmp_path / "m")), plan=None, out=tmp_path / "out", quantize=True, progress=False)
    assert "layer by layer" not in caplog.text
