"""Corners of files: JSON of one byte more than may be read. The file has no content: it takes no room."""

import pytest

from lightning_moe.files import read_json


def test_json_of_one_byte_too_many_is_refused_unread(tmp_path):
    path = tmp_path / "plan.json"
    with path.open("wb") as file:
        file.truncate(2**28 + 1)
    with pytest.raises(ValueError, match="not a readable plan: it has 268,435,457 bytes, more than 268,435,456"):
        read_json(path, what="plan")
