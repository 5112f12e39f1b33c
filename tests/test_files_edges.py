"""Corners of files: JSON of one byte more than may be read; keys that stand twice beside tensors."""

import pytest
import torch
from safetensors.torch import save_file

from lightning_moe.files import read_json, read_tensors


def test_a_key_that_stands_twice_in_metadata_is_refused(tmp_path):
    file = tmp_path / "statistics.safetensors"
    save_file({"sums": torch.ones(2)}, file, metadata={"record": '{"version": 1, "version": 2}'})
    with pytest.raises(ValueError, match="not a readable file of statistics: 'version' stands in it twice"):
        read_tensors(file, what="file of statistics")


def test_json_of_one_byte_too_many_is_refused_unread(tmp_path):
    """The file has no content: it takes no room."""
    path = tmp_path / "plan.json"
    with path.open("wb") as file:
        file.truncate(2**28 + 1)
    with pytest.raises(ValueError, match="not a readable plan: it has 268,435,457 bytes, more than 268,435,456"):
        read_json(path, what="plan")
