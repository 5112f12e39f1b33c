"""Teacher logits from somewhere else: counts are checked before anything is made of them, names stay inside."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing.binary_samples import make_teacher_logits, rows_to_teach

from lightning_moe.files import write_tensors
from lightning_moe.training.teacher_logits import TeacherLogits, TeacherManifest, open_shard


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "logits").mkdir()
    make_teacher_logits(tmp_path / "logits")
    return tmp_path / "logits"


def change(folder: Path, **fields: Any) -> dict[str, Any]:
    path = folder / "manifest.json"
    content = json.loads(path.read_text()) | fields
    path.write_text(json.dumps(content))
    return content


def test_a_sound_folder_is_read(folder) -> None:
    assert len(TeacherLogits(folder).of_rows(rows_to_teach(), corpus="wiki")) == 5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_rows", {"wiki": "5"}),
        ("num_rows", {"wiki": 2.5}),
        ("num_rows", {"wiki": True}),
        ("num_rows", {"wiki": -3}),
        ("num_rows", {"wiki": 10**40}),
        ("shard_rows", -1),
        ("shard_rows", True),
        ("vocab_size", 0),
        ("k", -2),
        ("corpora", {"wiki": 7}),
        ("corpora", {"wiki": "../../../outside"}),
        ("corpora", {"wiki": "g" * 64}),
    ],
)
def test_counts_and_digests_are_what_they_must_be(folder, field, value) -> None:
    change(folder, **{field: value})
    with pytest.raises(ValueError, match=rf"is not a manifest of teacher logits: \['{field}'\] do not fit"):
        TeacherManifest.load(folder)


def test_a_manifest_of_very_many_rows_costs_nothing(folder) -> None:
    change(folder, num_rows={"wiki": 10**15})
    next(folder.glob("*-00000004.safetensors")).unlink()
    with pytest.raises(ValueError, match=r"are not complete: .*-00000004.safetensors of corpus 'wiki' is missing"):
        TeacherLogits(folder)
    change(folder, shard_rows=10**15)
    with pytest.raises(ValueError, match=r"does not hold rows 0 to 999999999999999. Write it again"):
        TeacherLogits(folder)


def test_a_shard_of_other_rows_is_refused(tmp_path) -> None:
    write_tensors(tmp_path / "shard.safetensors", {"ids.0": torch.ones(1), "log_probs.1": torch.ones(1)}, metadata={})
    with pytest.raises(ValueError, match=r"shard.safetensors' does not hold rows 0 to 0"):
        open_shard(tmp_path / "shard.safetensors", rows=range(1))
