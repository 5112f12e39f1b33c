"""A calibration interrupted anywhere goes on after its last whole layer, and gives the same file, byte for byte."""

import json
import subprocess
import sys
from pathlib import Path

import interrupted_calibrations
import pytest
import torch
from interrupted_calibrations import POINTS, calibrated, interrupted, loaders
from tiny_models import random_tokens, tiny_model

from lightning_moe.calibration import layer_walk, streamed
from lightning_moe.calibration.streamed import collect_streamed
from lightning_moe.calibration.workspace import Workspace
from lightning_moe.models.streaming import StockFolder


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the child: another number of threads may add numbers up in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("deepseek_v3", dtype=torch.bfloat16).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory) -> bytes:
    """What an uninterrupted run saves."""
    folder = tmp_path_factory.mktemp("whole")
    calibrated(source, folder / "work").save(folder / "statistics")
    return (folder / "statistics").read_bytes()


def resumed(source: str, workspace: Path, *, monkeypatch) -> tuple[bytes, int]:
    """The file that running again gives, and how many layers were loaded for it."""
    loaded = []
    original = StockFolder.load_decoder
    monkeypatch.setattr(StockFolder, "load_decoder", lambda self, name: (loaded.append(name), original(self, name)))
    calibrated(source, workspace).save(workspace / "statistics")
    return (workspace / "statistics").read_bytes(), len(loaded)


@pytest.mark.parametrize("point", POINTS)
def test_an_exception(point, source, whole, tmp_path, monkeypatch) -> None:
    def fail() -> None:
        raise KeyboardInterrupt(point)

    with pytest.raises(KeyboardInterrupt, match=point), interrupted(point, fail):
        calibrated(source, tmp_path)
    assert not list(tmp_path.glob(".*"))
    assert resumed(source, tmp_path, monkeypatch=monkeypatch) == (whole, 3 - POINTS[point][-1])


@pytest.fixture(scope="module")
def killed(source, tmp_path_factory) -> Path:
    """A workspace for each point at which the process was killed."""
    folder = tmp_path_factory.mktemp("killed")
    subprocess.run([sys.executable, interrupted_calibrations.__file__, source, str(folder)], check=True)
    return folder


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_process(point, source, whole, killed, monkeypatch) -> None:
    assert resumed(source, killed / point, monkeypatch=monkeypatch) == (whole, 3 - POINTS[point][-1])
    assert not list((killed / point).glob(".*"))
    assert not list((killed / point).glob("inputs_*"))


def test_never_more_than_two_files_of_hidden_states(source, tmp_path, monkeypatch) -> None:

    seen = []
    original = layer_walk.read_hidden_states

    def watched(path):
        for hidden_BSH in original(path):
            seen.append(len(list(tmp_path.glob("*inputs_*"))))
            yield hidden_BSH

    monkeypatch.setattr(layer_walk, "read_hidden_states", watched)
    calibrated(source, tmp_path)
    assert seen == [2] * 6 + [1] * 3


@pytest.fixture
def stopped(source, tmp_path) -> Path:
    """A workspace in which the second layer is to be done."""

    def fail() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), interrupted("middle_of_a_layer", fail):
        calibrated(source, tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"moments": False}, "moments was 'True', is 'False'"),
        ({"dtype": "float32"}, "dtype was 'auto', is 'float32'"),
        ({"loaders": {"a": [{"input_ids": random_tokens()}]}}, "text was '.*', is '.*'"),
        ({"model": "qwen3_moe"}, "checkpoint was '.*', is '.*'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_run_is_refused(change, message, source, stopped, tmp_path_factory) -> None:
    if "model" in change:
        source = str(tmp_path_factory.mktemp("other"))
        tiny_model(change["model"]).save_pretrained(source)
    folder = StockFolder(source, dtype=change.get("dtype", "auto"))
    before = sorted(path.name for path in stopped.iterdir())
    with pytest.raises(ValueError, match=rf"left by another run: .*{message}.* Give another working folder"):
        collect_streamed(
            folder,
            loaders=change.get("loaders", loaders()),
            workspace=stopped,
            moments=change.get("moments", True),
            progress=False,
        )
    assert sorted(path.name for path in stopped.iterdir()) == before


def test_another_number_of_processes_is_refused(source, stopped) -> None:
    run = json.loads((stopped / "run.json").read_text())
    (stopped / "run.json").write_text(json.dumps(run | {"processes": "4"}))
    with pytest.raises(ValueError, match="processes was '4', is '1'"):
        calibrated(source, stopped)


def test_a_damaged_description_is_refused(source, stopped) -> None:
    (stopped / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run.json' is not a readable .* remove this one to start anew"):
        calibrated(source, stopped)


def test_a_folder_with_something_else_is_refused(source, tmp_path) -> None:
    (tmp_path / "letters.txt").write_text("dear")
    with pytest.raises(ValueError, match=r"holds something that is not of an interrupted run"):
        calibrated(source, tmp_path)
    with pytest.raises(ValueError, match=r"The working folder must be one that can be written to, got '.*letters.txt"):
        calibrated(source, tmp_path / "letters.txt")


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def change_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)


def damage_the_type(path: Path) -> None:
    path.write_bytes(b"\xff" + path.read_bytes()[1:])


def damage_the_shape(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:4] + b"\xff" + path.read_bytes()[5:])


def keep_a_part_of_a_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:9])


@pytest.mark.parametrize("damage", [shorten, change_a_bit, damage_the_type, damage_the_shape, keep_a_part_of_a_header])
def test_damaged_hidden_states_are_named(damage, source, stopped) -> None:
    damage(stopped / "inputs_00001.rank0.bin")
    with pytest.raises(ValueError, match=r"inputs_00001.rank0.bin' are damaged. Remove its folder and run again"):
        calibrated(source, stopped)


def test_missing_hidden_states_are_named(source, stopped) -> None:
    (stopped / "inputs_00001.rank0.bin").unlink()
    with pytest.raises(ValueError, match=r"There are no hidden states at '.*inputs_00001.rank0.bin'"):
        calibrated(source, stopped)
    (stopped / "inputs_00001.rank0.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"inputs_00001.rank0.bin' are not those of the text"):
        calibrated(source, stopped)


def test_half_a_file_under_a_temporary_name_is_removed(source, whole, stopped, monkeypatch) -> None:
    left = stopped / ".layer_00001.safetensors.0123abcd.tmp"
    left.write_bytes(b"half")
    assert resumed(source, stopped, monkeypatch=monkeypatch)[0] == whole
    assert not left.exists()


@pytest.mark.parametrize("damage", [shorten, change_a_bit])
def test_a_damaged_layer_is_named(damage, source, tmp_path) -> None:
    calibrated(source, tmp_path)
    damage(tmp_path / "layer_00001.safetensors")
    with pytest.raises(ValueError, match=r"layer_00001.safetensors' is .*Remove the folder '.*' and calibrate again"):
        calibrated(source, tmp_path)


def test_a_layer_that_cannot_be_saved_is_done_again(source, whole, tmp_path, monkeypatch) -> None:
    def full(*_, **__) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(streamed, "write_tensors", full)
        with pytest.raises(ValueError, match=r"cannot be written to '.*layer_00000.safetensors': .*No space left"):
            calibrated(source, tmp_path)
    assert resumed(source, tmp_path, monkeypatch=monkeypatch) == (whole, 3)


def test_a_folder_that_another_run_is_at_work_in_is_refused(tmp_path) -> None:
    code = (
        "import sys; from lightning_moe.calibration.workspace import Workspace; "
        "Workspace.open(sys.argv[1], run={'a': 'b'}); print('open', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "work")]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdin is not None
    assert other.stdout is not None
    assert other.stdout.readline() == "open\n"
    with pytest.raises(ValueError, match=r"Another run is at work in '.*work'. Wait for it. Name another `out`"):
        Workspace.open(tmp_path / "work", run={"a": "b"}, another="Name another `out`")
    other.communicate()
    space = Workspace.open(tmp_path / "work", run={"a": "b"})
    space.remove()
    assert not list(tmp_path.iterdir())
