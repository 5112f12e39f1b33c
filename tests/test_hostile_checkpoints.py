"""Checkpoints from somewhere else: read as data or refused in one line, without running what is in them."""

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import quiet_trainer, save_model

from callbacks.exact_resume import ExactResume
from lightning_moe.training.checkpoint import noted_structure
from lightning_moe.training.checkpoint_files import read_checkpoint
from lightning_moe.training.module import LanguageModelModule

CONTENT: dict[str, Any] = {"pytorch-lightning_version": "2.6.0", "state_dict": {"weight": torch.arange(64.0)}}


class Run:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def save(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def rewritten(path: Path, change: Callable[[dict[str, bytes]], Any], *, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    change(files)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def test_a_checkpoint_is_read(tmp_path) -> None:
    content = read_checkpoint(save(tmp_path / "whole.ckpt", CONTENT))
    assert torch.equal(content["state_dict"]["weight"], torch.arange(64.0))


def test_code_in_a_checkpoint_is_not_run(tmp_path) -> None:
    save_model(tmp_path / "model")
    path = save(tmp_path / "evil.ckpt", CONTENT | {"hyper_parameters": {"source": Run(tmp_path / "ran")}})
    match = r"evil.ckpt' cannot be read as data: .*could run code, which are never made"
    with pytest.raises(ValueError, match=match) as refused:
        read_checkpoint(path)
    assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match=match):
        LanguageModelModule.load_from_checkpoint(path, source=str(tmp_path / "model"))
    trainer, module = quiet_trainer([ExactResume()]), LanguageModelModule(source=str(tmp_path / "model"))
    with pytest.raises(ValueError, match=match):
        trainer.fit(module, ckpt_path=path)
    assert not (tmp_path / "ran").exists()
    read_checkpoint(path, trusted=True)  # who asks for it gets it
    assert (tmp_path / "ran").exists()


def test_a_checkpoint_over_http_is_not_unpickled_unasked(tmp_path) -> None:
    save_model(tmp_path / "model")
    module = LanguageModelModule(source=str(tmp_path / "model"))
    with pytest.raises(ValueError, match=r"is read over http, and Lightning would run code that is in it\. Copy it"):
        quiet_trainer([ExactResume()]).fit(module, ckpt_path="http://localhost:9/a.ckpt")


@pytest.mark.parametrize("weights_only", [None, True, False])
def test_lightning_is_told_to_read_data_alone(weights_only, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr("lightning.pytorch.core.saving.pl_load", lambda path, **kwargs: asked.append(kwargs) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        LanguageModelModule.load_from_checkpoint("http://localhost:9/a.ckpt", weights_only=weights_only)
    assert asked[0]["weights_only"] is (weights_only is not False)


def test_a_zip_bomb_is_not_unpacked(tmp_path) -> None:
    path = save(tmp_path / "bomb.ckpt", CONTENT)
    large = next(name for name in zipfile.ZipFile(path).namelist() if name.endswith("data/0"))
    rewritten(path, lambda files: files.update({large: bytes(2**26)}), compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**20
    with pytest.raises(ValueError, match=r"bomb.ckpt' cannot be read: it has compressed members"):
        read_checkpoint(path)


def test_members_larger_than_the_file_are_refused(tmp_path) -> None:
    path = save(tmp_path / "lie.ckpt", CONTENT)
    with zipfile.ZipFile(path) as archive:
        entry = next(member for member in archive.infolist() if member.filename.endswith("data/0"))
    size = entry.file_size.to_bytes(4, "little")
    content = path.read_bytes()
    at = content.index(entry.filename.encode(), content.rindex(b"PK\x01\x02", 0, content.rindex(b"data/0"))) - 46 + 20
    assert content[at : at + 8] == size * 2  # compressed and plain size in the directory
    path.write_bytes(content[:at] + (2**31).to_bytes(4, "little") * 2 + content[at + 8 :])
    with pytest.raises(ValueError, match=r"lie.ckpt' cannot be read: its members are larger than the file"):
        read_checkpoint(path)


def test_the_old_format_is_refused_unread(tmp_path) -> None:
    torch.save(CONTENT, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"old.ckpt' cannot be read: it is no checkpoint of PyTorch \(a zip archive\)"):
        read_checkpoint(tmp_path / "old.ckpt")


@pytest.mark.parametrize("cut", [1, 100, -1])
def test_a_truncated_one_is_refused(cut, tmp_path) -> None:
    path = save(tmp_path / "half.ckpt", CONTENT)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"half.ckpt' cannot be read: .*Was the run killed while it was written"):
        read_checkpoint(path)


@pytest.mark.parametrize("opcodes", [b"\x80\x02.", b"\x80\x02cbuiltins\nexec\n.", b"N.", b"", b"\x80\x02h\x05."])
def test_a_damaged_pickle_is_refused(opcodes, tmp_path) -> None:
    path = save(tmp_path / "odd.ckpt", CONTENT)
    pickled = next(name for name in zipfile.ZipFile(path).namelist() if name.endswith("data.pkl"))
    rewritten(path, lambda files: files.update({pickled: opcodes}))
    with pytest.raises(ValueError, match=r"odd.ckpt' (cannot be read|is no checkpoint)") as refused:
        read_checkpoint(path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (1, "is no checkpoint: Lightning did not write it"),
        ({"pytorch-lightning_version": 2}, "is no checkpoint: Lightning did not write it"),
        (CONTENT | {"state_dict": [1]}, "is damaged: `state_dict` in it is no mapping"),
        (CONTENT | {"callbacks": 3}, "is damaged: `callbacks` in it is no mapping"),
        (CONTENT | {"lightning_moe": "x"}, "is damaged: `lightning_moe` in it is no mapping"),
        (CONTENT | {"state_dict": {"weight": 1.0}}, "`state_dict` holds 'weight', which is no tensor"),
        (CONTENT | {"state_dict": {3: torch.ones(1)}}, "`state_dict` holds 3, which is no tensor"),
    ],
)
def test_what_is_no_checkpoint_is_refused(content, match, tmp_path) -> None:
    with pytest.raises(ValueError, match=match):
        read_checkpoint(save(tmp_path / "other.ckpt", content))


def test_a_structure_that_is_no_mapping_is_refused() -> None:
    with pytest.raises(ValueError, match="The checkpoint is damaged: `lightning_moe` in it is no mapping, but 5"):
        noted_structure({"lightning_moe": 5})


def test_weights_are_needed(tmp_path) -> None:
    path = save(tmp_path / "empty.ckpt", {"pytorch-lightning_version": "2.6.0"})
    with pytest.raises(ValueError, match=r"empty.ckpt' holds no weights: it has no `state_dict`"):
        LanguageModelModule.load_from_checkpoint(path, source="asset:small_moe")


def test_a_directory_or_a_fifo_is_no_checkpoint(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe.ckpt")
    for path in (tmp_path, tmp_path / "pipe.ckpt"):
        with pytest.raises(ValueError, match=r"There is no checkpoint '.*': there is no such file"):
            read_checkpoint(path)
