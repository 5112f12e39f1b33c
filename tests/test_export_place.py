"""Where exports are made: what kills, full disks and failed comparisons leave of them and of what was there before."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from dora_reference import shake
from safetensors import SafetensorError
from tiny_models import tiny_model

from lightning_moe.adapters.inject import AdapterConfig, inject_adapters
from lightning_moe.export import padded, writers
from lightning_moe.export.deploy import export_model
from lightning_moe.export.place import check_room, made_beside
from lightning_moe.models.loading import load_model
from lightning_moe.surgery.cut import convert_experts

FORMATS = ["adapter", "merged_nf4", "ragged", "padded", "stock"]
# Dies where the export is whole and about to get its name.
_KILLED = """
import os, signal, sys
sys.path[:0] = sys.argv[1:3]
from lightning_moe.export import place
from lightning_moe.export.deploy import export_model
from tiny_models import tiny_model
place.move_into_place = lambda new, path: os.kill(os.getpid(), signal.SIGKILL)
export_model(tiny_model(seed=1), folder=sys.argv[3], formats=["stock"])
"""


def export(folder, format, *, seed=0):
    """One export of a model that has adapters where the format wants some."""
    model, peft_model = tiny_model(seed=seed), None
    if format in ("adapter", "merged_nf4"):
        convert_experts(model)
        peft_model = inject_adapters(model, config=AdapterConfig(expert_rank=2, router_rank=2, train_norms=True))
        shake(peft_model, scale=0.02)
    return export_model(model, folder=folder, formats=[format], peft_model=peft_model)


def content(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def sabotaged(source, **settings):
    model = load_model(source, **settings)
    model.get_output_embeddings().weight.data[7] += 1
    return model


@pytest.mark.parametrize("format", FORMATS)
def test_a_failed_comparison_leaves_the_older_export_and_says_where_the_new_one_is(format, tmp_path, monkeypatch):
    export(tmp_path, format)
    (tmp_path / format / "README.md").write_text("mine")
    before = content(tmp_path / format)
    monkeypatch.setattr(writers, "load_model", sabotaged)
    with pytest.raises(ValueError, match=rf"'.+/{format}\.unfinished/.+' does not reproduce the model"):
        export(tmp_path, format, seed=1)
    assert content(tmp_path / format) == before
    assert sorted(os.listdir(tmp_path)) == sorted([format, f"{format}.unfinished"])
    monkeypatch.undo()
    export(tmp_path, format, seed=1)
    assert os.listdir(tmp_path) == [format]
    assert (tmp_path / format / "README.md").read_text() == "mine"


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk_names_the_target_and_leaves_nothing(format, tmp_path, monkeypatch):
    def full(*arguments, **settings):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    monkeypatch.setattr(padded, "save_file", full)
    with pytest.raises(ValueError, match=rf"The export '.+/{format}(/base)?' cannot be written: .*No space left"):
        export(tmp_path / "out", format)
    assert os.listdir(tmp_path / "out") == []


def test_what_the_system_says_is_named_too(tmp_path):
    def write():
        with made_beside(tmp_path / "ragged") as made:
            made.mkdir()
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ValueError, match=r"The export '.+/ragged' cannot be written: .*No space left.*Make room"):
        write()


@pytest.mark.parametrize("format", FORMATS)
def test_too_little_room_is_said_before_anything_is_written(format, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match=r"takes at least 0\.\d+ GB, and its disk has 1e-06 GB left. Make room"):
        export(tmp_path / "out", format)
    assert os.listdir(tmp_path / "out") == []


def test_the_estimate_by_hand(tmp_path, monkeypatch):
    """A matrix of 8 x 4 and a bias of 8 in fp32: 160 bytes, or 96 with the matrix in 16 bit."""
    model = torch.nn.Linear(4, 8)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=96))
    check_room(tmp_path / "a" / "b", model=model, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"takes at least 1\.6e-07 GB, and its disk has 9\.6e-08 GB"):
        check_room(tmp_path / "a" / "b", model=model, dtype=torch.float32)


def test_a_killed_export_leaves_the_older_one_and_is_swept_by_the_next(tmp_path):
    export(tmp_path, "stock")
    (tmp_path / "stock" / "README.md").write_text("mine")
    before = content(tmp_path / "stock")
    tests = os.path.dirname(__file__)
    command = [sys.executable, "-c", _KILLED, os.path.dirname(tests), tests, str(tmp_path)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -signal.SIGKILL
    assert content(tmp_path / "stock") == before
    whole = content(tmp_path / "stock.unfinished" / "stock")
    assert {"config.json", "manifest.json", "README.md"} < whole.keys()
    assert whole["README.md"] == b"mine"
    export(tmp_path, "stock", seed=1)
    assert os.listdir(tmp_path) == ["stock"]
    assert content(tmp_path / "stock")["model.safetensors"] == whole["model.safetensors"] != before["model.safetensors"]


def test_an_older_export_that_was_on_its_way_out_comes_back(tmp_path):
    retired = tmp_path / "ragged.unfinished" / "ragged.old"
    retired.mkdir(parents=True)
    (retired / "config.json").write_text("{}")

    def fail():
        with made_beside(tmp_path / "ragged"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert (tmp_path / "ragged" / "config.json").read_text() == "{}"
    assert os.listdir(tmp_path) == ["ragged"]


def test_somebody_elses_folder_of_that_name_is_not_removed(tmp_path):
    (tmp_path / "stock.unfinished").mkdir()
    (tmp_path / "stock.unfinished" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"stock\.unfinished' is where an export is made, and it holds 'thesis\.tex'"):
        export(tmp_path, "stock")
    assert (tmp_path / "stock.unfinished" / "thesis.tex").read_text() == "years of work"


def test_what_lies_beside_a_base_and_its_adapter_is_not_lost(tmp_path):
    export(tmp_path, "adapter")
    (tmp_path / "adapter" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"adapter' holds 'thesis\.tex' too, which would be lost\. Move it"):
        export(tmp_path, "adapter")
