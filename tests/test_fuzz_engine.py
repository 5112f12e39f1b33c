"""The watch over damaged samples sees what it is there for, and a campaign counts it."""

import json
import os
import pickle
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fuzzing import guard
from fuzzing.campaign import kinds_of, run_batch
from fuzzing.damage_json import VALUES
from fuzzing.damage_tensors import change_metadata, join
from fuzzing.guard import guarded
from fuzzing.readers import Reader, Sample
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_moe.files import read_json

pytestmark = pytest.mark.fuzz


class Call:
    def __reduce__(self):
        return os.getcwd, ()


def refuse(message: str, kind: type[Exception] = ValueError) -> Callable[[Path], object]:
    def read(folder: Path) -> None:
        raise kind(message)

    return read


def chained(folder: Path) -> None:
    try:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
    except RuntimeError as error:
        raise ValueError("'file' cannot be read") from error


@pytest.mark.parametrize(
    ("read", "what"),
    [
        (lambda folder: Path("/etc/hostname").read_text(), r"opened '/etc/hostname'"),
        (lambda folder: (folder.parent / "new").write_text("x"), "opened .*new"),
        (lambda folder: (folder / "link").read_text(), "opened .*link"),
        (lambda folder: exec((folder / "code.py").read_text()), "exec of|compile of"),
        (lambda folder: pickle.loads(pickle.dumps(Call())), "pickle.find_class"),
        (lambda folder: subprocess.run(["true"]), "forbidden: .*(subprocess|fork|exec)"),
        (lambda folder: socket.socket().connect(("127.0.0.1", 9)), "socket"),
        (lambda folder: os.remove(folder.parent / "other"), "os.remove"),
        (lambda folder: torch.empty(2**40), "asked for too much memory"),
        (lambda folder: bytearray(2**40), "asked for too much memory"),
        (chained, "asked for too much memory"),
        (lambda folder: {}["gone"], "KeyError"),
        (refuse("no file is named here"), "names no file or field"),
        (refuse("'file':\nis odd"), "several lines"),
        (refuse(""), "names no file or field"),
        (refuse("'file' is odd", RuntimeError), "RuntimeError"),
    ],
)
def test_what_reading_must_not_do_is_a_finding(read, what, tmp_path) -> None:
    folder = tmp_path / "sample"
    folder.mkdir()
    (tmp_path / "other").write_text("outside")
    (folder / "link").symlink_to(tmp_path / "other")
    (folder / "code.py").write_text("answer = 42\n")
    outcome = guarded(read, folder, refusals=(ValueError, OSError))
    assert outcome.kind == "finding"
    assert re.search(what, outcome.what), outcome.what


def test_what_hangs_is_a_finding(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(guard, "SECONDS", 0.2)
    outcome = guarded(lambda folder: time.sleep(30), tmp_path, refusals=(ValueError,))
    assert (outcome.kind, outcome.what) == ("finding", "took more than 0.2 seconds")


def test_data_is_read_and_refused(tmp_path) -> None:
    (tmp_path / "file").write_text("1")
    assert guarded(lambda folder: (folder / "file").read_text(), tmp_path, refusals=(ValueError,)).kind == "read"
    outcome = guarded(refuse("'file' is odd"), tmp_path, refusals=(ValueError,))
    assert (outcome.kind, outcome.what) == ("refused", "'file' is odd")


def make_letters(folder: Path) -> None:
    (folder / "letters.txt").write_bytes(b"abc" * 50)


def read_letters(folder: Path) -> None:
    file = folder / "letters.txt"
    if not file.is_file():
        raise ValueError("there is no 'letters.txt'")
    if file.read_bytes().startswith(b"abc"):
        return
    if not file.read_bytes():
        os.kill(os.getpid(), signal.SIGKILL)
    raise KeyError("letters")


def test_a_batch_is_decided_by_its_number_and_survives_its_child(tmp_path) -> None:
    reader = Reader(name="letters", make=make_letters, read=read_letters)
    sample = Sample.of(reader, folder=tmp_path / "sample")
    one, same, other = (run_batch(reader, sample, batch=batch, cases=60, keep=tmp_path) for batch in (3, 3, 4))
    counts = [
        (tally.cases, tally.read, tally.refused, [f.case for f in tally.findings]) for tally in (one, same, other)
    ]
    assert counts[0] == counts[1] != counts[2]
    killed = [finding for finding in one.findings + other.findings if finding.what == "the process died of SIGKILL"]
    assert killed
    assert {(reader, what) for reader, what, _ in kinds_of(one.findings)} >= {("letters", "KeyError")}
    kept = next(finding for finding in one.findings if finding.what.startswith("KeyError"))
    assert not (tmp_path / "letters" / kept.case / "letters.txt").read_bytes().startswith(b"abc")


def make_names(folder: Path) -> None:
    (folder / "model").mkdir()
    names = {str(index): "own.txt" for index in range(20)}
    (folder / "model" / "names.json").write_text(json.dumps(names))
    (folder / "model" / "own.txt").write_text("own")


def follow_names(folder: Path) -> None:
    """A reader without a check: it opens whatever file a name leads to, where there is one."""
    content = read_json(folder / "model" / "names.json", what="names")
    for name in content.values() if isinstance(content, dict) else ():
        path = folder / "model" / str(name).replace("\0", "")
        if len(str(name)) < 100 and path.is_file() and not str(name).startswith("/"):
            path.read_bytes()


def test_a_reader_that_follows_names_out_of_its_folder_is_caught(tmp_path) -> None:
    reader = Reader(name="names", make=make_names, read=follow_names, files=("model/names.json",))
    sample = Sample.of(reader, folder=tmp_path / "sample")
    told = [finding.what for finding in run_batch(reader, sample, batch=1, cases=200).findings]
    assert any(re.search(r"opened .*\.\./\.\./outside", what) for what in told)


@settings(max_examples=200, database=None, deadline=None, derandomize=True)
@given(st.lists(VALUES, min_size=4, max_size=4))
def test_values_that_are_drawn_are_new(values) -> None:
    """A case may change them: were they shared, the next case would differ, and hypothesis end the batch as flaky."""
    for value in values:
        assert not isinstance(value, list | dict) or "changed" not in value
        if isinstance(value, list):
            value.append("changed")
        elif isinstance(value, dict):
            value["changed"] = True


@pytest.mark.parametrize("metadata", [{}, 7, "text", None, {"record": "{}"}, {"record": 7}])
@settings(max_examples=20, database=None, deadline=None, derandomize=True)
@given(st.data())
def test_what_was_damaged_before_can_be_damaged_again(metadata, data) -> None:
    change_metadata(join({"__metadata__": metadata, "a": {}}, b"1234"), data.draw)
