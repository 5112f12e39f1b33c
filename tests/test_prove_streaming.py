"""The script that proves streaming under a memory limit, on programs that take no memory."""

import importlib
import random
import re
import sys
from pathlib import Path

import pytest

from scripts import memory_limit as limits

SCRIPTS = Path(__file__).parents[1] / "scripts"
GB = 10**9
needs_time = pytest.mark.skipif(not Path("/usr/bin/time").is_file(), reason="needs GNU time")
# Writes its name into five files of its working folder, keeps those that are there, and puts them together.
PROGRAM = """
import os, pathlib, sys, time
out, forgets = pathlib.Path(sys.argv[-1]), "--forgets" in sys.argv
work = out.with_name(out.name + ".partial")
again = work.exists()
work.mkdir(exist_ok=True)
for index in range(5):
    part = work / f"layer_{index}"
    if not part.exists():
        time.sleep(0.15)
        (work / ".part.tmp").write_text(str(index))
        (work / ".part.tmp").rename(part)
text = "".join((work / f"layer_{index}").read_text() for index in range(5))
(work / ".out.tmp").write_text(text + " again" * (forgets and again))
(work / ".out.tmp").rename(out)
for part in work.iterdir():
    part.unlink()
work.rmdir()
"""


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("prove_streaming")


def place_of(script, work, limit):
    return script.Place(
        work=work, limit=limit, random=random.Random(0), kills=2, program=(sys.executable, "-c", PROGRAM)
    )


@needs_time
@pytest.mark.parametrize(("words", "same"), [((), True), (("--forgets",), False)], ids=["resumes", "differs"])
def test_a_killed_command_is_run_again_and_compared(script, words, same, tmp_path):
    job = script.Job(name="job", words=words, out=tmp_path / "result")
    with limits.memory_limit(GB) as limit:
        result = script.prove(job, place_of(script, tmp_path, limit))
    assert result["files"][:4] == [f"layer_{index}" for index in range(4)]  # the last one is soon gone
    assert result["killed_at"]
    assert set(result["killed_at"]) < {f"layer_{index}" for index in range(5)}
    assert not result["working_folder_left"]
    assert (result["digest"] == result["digest_with_kills"]) is same
    row = script.row_of(result, libraries=0, layer_bytes=GB)
    assert row["resumed_identical"] == ("yes" if same else "NO")
    assert 5e6 < result["peak"] < 1e8


@needs_time
def test_a_command_that_fails_ends_the_proof_with_its_last_words(script, tmp_path):
    job = script.Job(name="job", words=(), out=tmp_path / "result")
    with limits.memory_limit(GB) as limit:
        place = place_of(script, tmp_path, limit)
        (tmp_path / "result.partial").mkdir()
        (tmp_path / "result.partial" / "strange").mkdir()
        run = place.run(job.words, out=job.out)
        with pytest.raises(SystemExit, match=r"(?s)job ended with code 1 .*(IsADirectory|Permission)Error"):
            script.check(run, job, place)


@needs_time
def test_a_limit_holds(tmp_path):
    with limits.memory_limit(2 * 10**8) as limit:
        for megabytes, passes in [(100, True), (400, False)]:
            command = [sys.executable, "-c", f"b = bytearray(b'1') * {megabytes * 10**6}"]
            run = limits.run_measured(command, limit=limit, log=tmp_path / "run.log")
            assert (run.code == 0) is passes, limit.how
            assert not passes or run.peak > megabytes * 10**6


def test_without_a_control_group_the_data_segment_is_limited(tmp_path):
    with limits.memory_limit(2 * 10**8, mount=tmp_path, own="4:memory:/somewhere\n0::/\n") as limit:
        assert limit.how == "RLIMIT_DATA of each process, page cache not"
        assert limit.prefix[0] == "sh"


def test_version_2_is_preferred_where_it_can_limit(tmp_path):
    """Files of a group appear when the kernel makes one; here nobody does, and nothing is left behind."""
    (tmp_path / "memory" / "own").mkdir(parents=True)
    own = "4:memory:/own\n3:cpu:/\n0::/\n"
    assert limits._parents(tmp_path, own) == [
        (tmp_path, "memory.max"),
        (tmp_path / "memory" / "own", "memory.limit_in_bytes"),
    ]
    with limits.memory_limit(GB, mount=tmp_path, own=own) as limit:
        assert limit.how.startswith("RLIMIT_DATA")
    assert list((tmp_path / "memory" / "own").iterdir()) == []


def test_a_digest_tells_names_and_bytes_apart(script, tmp_path):
    for name, files in {"a": {"x": "1"}, "same": {"x": "1"}, "name": {"y": "1"}, "bytes": {"x": "2"}}.items():
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / file).write_text(text)
    digests = [script.digest(tmp_path / name) for name in ("a", "same", "name", "bytes")]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


@needs_time
@pytest.mark.slow
def test_the_commands_resume_to_the_same_bytes(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys,
        "argv",
        ["prove", "--quick", "--work", str(tmp_path / "work"), "--tokens", "2048", "--json", str(tmp_path / "j")],
    )
    script.main()
    table = capsys.readouterr().out
    assert not re.search(r"\bNO\b", table)
    assert table.count("yes") >= 3  # a command may end before it can be killed
