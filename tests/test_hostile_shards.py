"""Folders of checkpoint shards from somewhere else: PyTorch unpickles parts of them, which is looked at before."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter

from lightning_moe.training.checkpoint_files import read_checkpoint
from lightning_moe.training.shard_files import TABLE

# Saving outside of a distributed run is what is meant here.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


class Run:
    """Unpickled, it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def shards(folder: Path, **more: Any) -> Path:
    state = {"state_dict": {"weight": torch.arange(12.0).view(3, 4), "half": torch.ones(2, dtype=torch.bfloat16)}}
    groups = {"lr": 0.1, "betas": (0.9, 0.95), "params": ["weight"], "foreach": None}
    state["optimizer_0"] = {"state": {"step": torch.tensor(3)}, "param_groups": groups | more}
    dcp.save(state, storage_writer=FileSystemWriter(folder), no_dist=True)
    torch.save({"pytorch-lightning_version": "2.6.0", "callbacks": {}}, folder / "meta.pt")
    return folder


def edited(folder: Path, change: Callable[[Any], Any]) -> None:
    table = FileSystemReader(folder).read_metadata()
    change(table)
    (folder / TABLE).write_bytes(pickle.dumps(table))


def test_a_folder_of_shards_is_looked_through_and_read(tmp_path) -> None:
    folder = shards(tmp_path / "last.ckpt")
    assert read_checkpoint(folder / "meta.pt")["callbacks"] == {}


@pytest.mark.parametrize("place", ["table", "part of the table", "number"])
def test_nothing_in_a_folder_of_shards_runs(tmp_path, place) -> None:
    evil = Run(tmp_path / "ran")
    folder = shards(tmp_path / "last.ckpt", **({"lr": evil} if place == "number" else {}))
    if place == "table":
        (folder / TABLE).write_bytes(pickle.dumps(evil))
    elif place == "part of the table":
        edited(folder, lambda table: setattr(table, "planner_data", evil))
    with pytest.raises(ValueError, match=r"meta.pt' cannot be read as data: .*mkdir.* could run code") as error:
        read_checkpoint(folder / "meta.pt")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()
    read_checkpoint(folder / "meta.pt", trusted=True)


def test_a_table_is_one(tmp_path) -> None:
    folder = shards(tmp_path / "last.ckpt")
    (folder / TABLE).write_bytes(pickle.dumps({"weight": 1}))
    with pytest.raises(ValueError, match=r"meta.pt' cannot be read: .*is no table of contents"):
        read_checkpoint(folder / "meta.pt")
    (folder / TABLE).write_bytes(pickle.dumps(Run))
    with pytest.raises(ValueError, match="it asks for the object"):
        read_checkpoint(folder / "meta.pt")


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd"])
def test_shards_lie_in_their_folder(tmp_path, name) -> None:
    folder = shards(tmp_path / "last.ckpt")
    edited(folder, lambda table: [setattr(place, "relative_path", name) for place in table.storage_data.values()])
    with pytest.raises(ValueError, match=r"'\.metadata' names a file outside the folder"):
        read_checkpoint(folder / "meta.pt")


@pytest.mark.parametrize("field", ["offset", "length"])
@pytest.mark.parametrize("value", [-1, 10**12])
def test_numbers_lie_in_their_shard(tmp_path, field, value) -> None:
    folder = shards(tmp_path / "last.ckpt")
    edited(folder, lambda table: [setattr(place, field, value) for place in table.storage_data.values()])
    with pytest.raises(ValueError, match=r"meta.pt' cannot be read: 'optimizer_0.* is no part of '__0_0.distcp'"):
        read_checkpoint(folder / "meta.pt")


@pytest.mark.parametrize("content", [b"", b"damaged", pickle.dumps({})])
def test_a_damaged_table_is_told(tmp_path, content) -> None:
    folder = shards(tmp_path / "last.ckpt")
    (folder / TABLE).write_bytes(content)
    with pytest.raises(ValueError, match=r"The checkpoint '.*meta.pt' cannot be read"):
        read_checkpoint(folder / "meta.pt")
