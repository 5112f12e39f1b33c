"""The tokenizer beside an export."""

import os
from pathlib import Path

import pytest

from lightning_moe.export.tokenizer_files import save_tokenizer
from lightning_moe.training.tokenization import load_tokenizer


def test_it_is_written_and_loads_again(tmp_path):
    save_tokenizer(load_tokenizer("asset:small_moe"), folder=tmp_path / "model")
    again = load_tokenizer(str(tmp_path / "model"))
    assert again("some words")["input_ids"] == load_tokenizer("asset:small_moe")("some words")["input_ids"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_an_error_of_the_disk(tmp_path):
    os.symlink("/dev/full", tmp_path / "tokenizer.json")
    with pytest.raises(OSError, match=r"The tokenizer cannot be written to '.*': No space left on device"):
        save_tokenizer(load_tokenizer("asset:small_moe"), folder=tmp_path)
