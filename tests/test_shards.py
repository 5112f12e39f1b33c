"""Shards of a model: named by layer, whole or not there, their index last."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_moe.export.shards import INDEX_NAME, ShardedWriter


@pytest.fixture
def writer(tmp_path) -> ShardedWriter:
    return ShardedWriter(folder=tmp_path, names=["model.layers.0", "model.layers.1"])


def test_a_shard_is_what_safetensors_writes(writer, tmp_path) -> None:
    tensors = {
        "model.layers.1.b": torch.arange(6).view(2, 3).T,
        "model.layers.1.a": torch.ones(2, dtype=torch.bfloat16),
    }
    assert [writer.done(index) for index in range(writer.num_shards)] == [False] * 3
    writer.write(1, tensors)
    assert [writer.done(index) for index in range(writer.num_shards)] == [False, True, False]
    file = tmp_path / "model-00002-of-00003.safetensors"
    save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / "x", metadata={"format": "pt"})
    assert file.read_bytes() == (tmp_path / "x").read_bytes()
    assert torch.equal(load_file(file)["model.layers.1.b"], tensors["model.layers.1.b"])


def test_the_index_counts_bytes_and_names_files(writer, tmp_path) -> None:
    for index, name in enumerate(("model.layers.0.z", "model.layers.1.z", "lm_head.weight")):
        writer.write(index, {name: torch.zeros(3 + index)})
    writer.write_index()
    content = json.loads((tmp_path / INDEX_NAME).read_text())
    assert content["metadata"] == {"total_size": 4 * (3 + 4 + 5)}
    assert list(content["weight_map"].items()) == [
        ("lm_head.weight", "model-00003-of-00003.safetensors"),
        ("model.layers.0.z", "model-00001-of-00003.safetensors"),
        ("model.layers.1.z", "model-00002-of-00003.safetensors"),
    ]


def test_a_shard_that_cannot_be_written_is_named(writer, tmp_path) -> None:
    missing = ShardedWriter(folder=tmp_path / "file" / "below", names=writer.names)
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(
        ValueError, match=r"file/below/model-00001-of-00003.safetensors' cannot be written: .*Not a dir"
    ):
        missing.write(0, {"a": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"model-00001-of-00003.safetensors' is damaged: .* Remove it"):
        writer.write_index()


def test_a_shard_that_changed_since_it_was_written_is_not_done(tmp_path, caplog):
    writer = ShardedWriter(folder=tmp_path / "model", names=["layers.0"])
    assert not writer.done(0)
    writer.write(0, {"layers.0.weight": torch.arange(8.0)})
    assert writer.done(0)
    content = bytearray(writer.path(0).read_bytes())
    content[-1] ^= 1
    writer.path(0).write_bytes(content)
    assert not writer.done(0)
    assert "damaged and is written again" in caplog.text
    writer.write(0, {"layers.0.weight": torch.arange(8.0)})
    assert writer.done(0)
    assert [path.name for path in writer.folder.iterdir()] == [writer.path(0).name]
