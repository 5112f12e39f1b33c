"""Files appear whole or not at all, and a damaged one is named."""

import copy
import json
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from stored_types import restate_type
from tensor_peak import tensor_peak

from lightning_moe import renaming
from lightning_moe.calibration.workspace import Workspace
from lightning_moe.files import (
    _SAFETENSORS_TYPES,
    LazyTensors,
    digest_of_tensors,
    folder_bytes,
    open_tensors,
    read_json,
    read_shapes,
    read_tensors,
    write_atomically,
    write_json,
    write_tensors,
)


def test_a_file_appears_when_the_block_ends(tmp_path) -> None:
    target = tmp_path / "new" / "file.txt"
    with write_atomically(target) as temporary:
        temporary.write_text("whole")
        assert not target.exists()
    assert target.read_text() == "whole"
    assert [file.name for file in target.parent.iterdir()] == ["file.txt"]


def test_an_exception_leaves_the_old_file_and_no_rest(tmp_path) -> None:
    target = tmp_path / "file.txt"
    target.write_text("old")

    def fail() -> None:
        with write_atomically(target) as temporary:
            temporary.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert target.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["file.txt"]


def write_folder(target: Path, name: str) -> None:
    with write_atomically(target) as temporary:
        temporary.mkdir()
        (temporary / name).write_text(name)


def test_a_folder_is_replaced_as_a_whole(tmp_path) -> None:
    write_folder(tmp_path / "model", "first")
    write_folder(tmp_path / "model", "second")
    assert [file.name for file in (tmp_path / "model").iterdir()] == ["second"]
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_a_folder_is_back_when_its_replacement_cannot_be_moved(tmp_path, monkeypatch) -> None:
    write_folder(tmp_path / "model", "first")

    replace = os.replace

    def refuse_new(source: Path, target: Path) -> None:
        if Path(source).suffix == ".tmp":
            raise OSError("no")
        replace(source, target)

    monkeypatch.setattr(renaming, "exchange", lambda first, second: False)  # as where the system has no such step
    monkeypatch.setattr(os, "replace", refuse_new)
    with pytest.raises(OSError, match="no"):
        write_folder(tmp_path / "model", "second")
    assert [file.name for file in (tmp_path / "model").iterdir()] == ["first"]
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_json_and_tensors_come_back(tmp_path) -> None:
    write_json(tmp_path / "a.json", {"b": [1, 2]})
    assert read_json(tmp_path / "a.json", what="thing") == {"b": [1, 2]}
    tensors = {"x": torch.arange(6).view(2, 3).T, "y": torch.zeros(0)}
    write_tensors(tmp_path / "a.safetensors", tensors, metadata={"kind": "test", "list": [1]})
    found, metadata = read_tensors(tmp_path / "a.safetensors", what="thing")
    assert torch.equal(found["x"], tensors["x"])
    assert metadata == {"kind": "test", "list": [1]}
    assert read_shapes(tmp_path / "a.safetensors", what="thing") == {"x": (3, 2), "y": (0,)}
    assert folder_bytes(tmp_path) == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert folder_bytes(tmp_path / "a.json") == (tmp_path / "a.json").stat().st_size


def test_tensors_are_written_as_safetensors_writes_them_one_at_a_time(tmp_path) -> None:
    """Every type, no numbers, a scalar, a transposed one, names and metadata outside ASCII."""
    tensors = {
        f'{index * 7 % 5}|{name}|é"\n{dtype}': torch.arange(6).view(2, 3).to(dtype)[:, :columns].T
        for index, dtype in enumerate(_SAFETENSORS_TYPES)
        for name, columns in (("b", 3), ("a", 2), ("none", 0))
    }
    tensors["scalar"] = torch.tensor(1.5)
    write_tensors(tmp_path / "own", tensors, metadata={"record": {"a": 'é"\n'}})
    encoded = {"record": json.dumps({"a": 'é"\n'})}
    save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / "other", metadata=encoded)
    assert (tmp_path / "own").read_bytes() == (tmp_path / "other").read_bytes()
    lazy = LazyTensors({str(index): partial(torch.zeros, 2**17) for index in range(16)})
    assert tensor_peak(lambda: write_tensors(tmp_path / "lazy", lazy, metadata={})) <= 2 * 2**19


def test_digest_depends_on_names_types_and_values() -> None:
    base = {"a": torch.ones(2), "b": torch.zeros(1)}
    assert digest_of_tensors(base) == digest_of_tensors(dict(reversed(base.items())))
    others = [{"a": torch.ones(2)}, base | {"a": torch.ones(2, dtype=torch.float64)}, base | {"a": torch.ones(1, 2)}]
    assert len({digest_of_tensors(other) for other in [base, *others]}) == 4


@pytest.mark.parametrize("read", [read_json, read_tensors, open_tensors, read_shapes], ids=lambda read: read.__name__)
def test_missing_and_damaged_files_are_named(read, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"There is no thing at '.*gone'"):
        read(tmp_path / "gone", what="thing")
    (tmp_path / "bad").write_bytes(b"{\xff\xff")
    with pytest.raises(ValueError, match=r"'.*bad' is not a readable thing: "):
        read(tmp_path / "bad", what="thing")


@pytest.mark.parametrize("read", [read_json, open_tensors], ids=lambda read: read.__name__)
def test_nesting_beyond_measure_is_named(read, tmp_path) -> None:
    nested = "[" * 100_000
    save_file({}, tmp_path / "bad", metadata={"record": nested})
    if read is read_json:
        (tmp_path / "bad").write_text(nested)
    with pytest.raises(ValueError, match=r"'.*bad' is not a readable thing: .*recursion"):
        read(tmp_path / "bad", what="thing")


def test_a_type_without_a_tensor_is_named(tmp_path) -> None:
    write_tensors(tmp_path / "a", {"x": torch.zeros(4)}, metadata={})
    restate_type(tmp_path / "a", "x", dtype="F4", bits=4)
    tensors, _ = open_tensors(tmp_path / "a", what="thing")
    with pytest.raises(ValueError, match=r"'.*a' changed or is damaged: x: .*size 16"):
        _ = tensors["x"]


def test_lazy_tensors_are_made_when_they_are_asked_for() -> None:
    asked: list[str] = []

    def make(name: str) -> torch.Tensor:
        asked.append(name)
        return torch.ones(2)

    tensors = LazyTensors({name: partial(make, name) for name in ("a", "b")})
    assert list(tensors) == ["a", "b"]
    assert len(tensors) == 2
    assert "a" in tensors
    assert "c" not in tensors
    assert not asked
    assert torch.equal(tensors["b"], torch.ones(2))
    assert torch.equal(tensors["b"], torch.ones(2))
    assert asked == ["b", "b"]
    sent = copy.copy(tensors)
    assert type(sent) is dict
    assert asked == ["b", "b", "a", "b"]


def test_an_open_file_is_read_later_even_when_its_name_is_gone(tmp_path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"x": torch.arange(3.0)}, metadata={"record": 1})
    tensors, metadata = open_tensors(path, what="thing")
    write_tensors(path, {"x": torch.zeros(3)}, metadata={})
    path.unlink()
    assert metadata == {"record": 1}
    assert torch.equal(tensors["x"], torch.arange(3.0))


def test_others_may_read_what_the_umask_lets_them(tmp_path):
    """safetensors writes files that only their owner can read."""
    mask = os.umask(0o022)
    try:
        write_tensors(tmp_path / "one.safetensors", {"a": torch.ones(2)}, metadata={})
        with write_atomically(tmp_path / "folder") as temporary:
            temporary.mkdir()
            save_file({"a": torch.ones(2)}, temporary / "model.safetensors")
    finally:
        os.umask(mask)
    for file in (tmp_path / "one.safetensors", tmp_path / "folder" / "model.safetensors"):
        assert file.stat().st_mode & 0o777 == 0o644


def test_a_folder_that_is_removed_never_stays_in_part_under_its_name(tmp_path, monkeypatch):
    folder = tmp_path / "work"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / name).write_text(name)

    def killed(path):
        (path / "a").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            renaming.remove_at_once(folder)
    assert not folder.exists()
    (left,) = tmp_path.iterdir()
    dead = left.rename(left.with_name(left.name.replace(f".{os.getpid()}.", f".{2**22 + 1}.")))
    Workspace.open(folder, run={})
    assert not dead.exists()


def test_json_larger_than_any_of_ours_is_not_read(tmp_path):
    with (tmp_path / "plan.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(
        ValueError, match=r"plan.json' is not a readable plan: it has 1,099,511,627,776 bytes, more than"
    ):
        read_json(tmp_path / "plan.json", what="plan")
