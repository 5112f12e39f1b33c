"""One copy of a model in the memory of a node, and refusals that every process hears."""

import logging
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from random_plans import random_plan
from tiny_models import tiny_model
from torch import nn

from lightning_moe.calibration.processes import Processes
from lightning_moe.export.huggingface import save_ragged
from lightning_moe.models.stored_tensors import open_files
from lightning_moe.quantization.linears import quantize_model
from lightning_moe.surgery.cut import apply_plan
from lightning_moe.training import node_loading
from lightning_moe.training.mapped_tensors import map_tensor, write_mappable
from lightning_moe.training.node_loading import leave_frozen_alone, load_shared, storages_of

pytestmark = pytest.mark.multiprocess


def save_models(path):
    """Stock, tied, ragged and NF4 folders, and one of 50 MB."""
    tiny_model("qwen2_moe", dtype=torch.bfloat16).save_pretrained(path / "stock")
    tiny_model("granitemoe", dtype=torch.bfloat16, tie_word_embeddings=True).save_pretrained(path / "tied")
    tiny_model(dtype=torch.bfloat16, num_experts=32, moe_intermediate_size=512, hidden_size=256).save_pretrained(
        path / "large"
    )
    model = tiny_model("qwen2_moe", dtype=torch.bfloat16)
    apply_plan(model, plan=random_plan(model, evicted=[[0], []]))
    save_ragged(model, path / "ragged")
    quantize_model(model)
    save_ragged(model, path / "nf4")


def save_differences(path):
    """What the two processes find under one name: the second has nothing, half a file, another model, another seed."""
    for rank in range(2):
        for case in ("truncated", "other", "retrained") + ("missing",) * (rank == 0):
            shutil.copytree(path / "stock", path / f"rank{rank}" / case)
    damaged = path / "rank1" / "truncated" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1000])
    tiny_model(dtype=torch.bfloat16).save_pretrained(path / "rank1" / "other")
    tiny_model("qwen2_moe", dtype=torch.bfloat16, seed=1).save_pretrained(path / "rank1" / "retrained")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What both processes found, by rank."""
    path = tmp_path_factory.mktemp("node_loading")
    (path / "temporary").mkdir()
    save_models(path)
    save_differences(path)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    script = [sys.executable, str(Path(__file__).with_name("node_loading_run.py")), str(path)]
    with subprocess.Popen([*script, "0", "2"], env=environment, stderr=subprocess.DEVNULL) as first:
        second = subprocess.run([*script, "1", "2"], env=environment, capture_output=True, text=True, timeout=200)
        assert first.wait(timeout=100) == second.returncode == 0, second.stderr[-3000:]
    return [torch.load(path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def test_copies_equal_the_source_and_leave_nothing_on_the_disk(results):
    """Equality is asserted in the processes."""
    assert [rank["left"] for rank in results] == [[], []]


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").is_file(), reason="reads what Linux tells of memory")
def test_a_stock_model_is_in_memory_once(results):
    """Put together from its experts it is each process's own; as a copy that is mapped it is nobody's.

    Measured in the second process: the first makes the copy, and its allocator keeps some of what that took.
    """
    (shared, num_bytes), (alone, _) = results[1]["shared"], results[1]["alone"]
    assert num_bytes > 50e6
    assert alone > 0.8 * num_bytes
    assert shared < 0.1 * num_bytes


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing", r"Process 1 on '.+': There is no model at '.+missing'"),
        ("truncated", r"Process 1 on '.+': '.+truncated/model\.safetensors' is not a readable file of weights"),
        ("other", r"'.+other' is not the same model for all processes: process 0 on '.+' and process 1 on '.+' read"),
        ("retrained", r"'.+retrained' is not the same model for all processes.*Copy one folder to every machine"),
    ],
)
def test_every_process_hears_what_one_cannot_read(results, case, message):
    for rank in results:
        with pytest.raises(ValueError, match=message):
            raise ValueError(rank[case])


class Two(Processes):
    """Two processes of which this is the first, and the other says the same."""

    def gather(self, value):
        return [value, value]


@pytest.fixture
def stock(tmp_path):
    tiny_model().save_pretrained(tmp_path / "stock")
    return str(tmp_path / "stock")


def test_without_room_each_process_keeps_its_own(stock, monkeypatch, caplog):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with caplog.at_level(logging.WARNING):
        model = load_shared(stock, dtype="auto", processes=Two(rank=0, size=2))
    assert model.name_or_path == stock
    assert "Each process keeps its own copy of" in caplog.text
    assert "Set TMPDIR to a folder with more room" in caplog.text
    assert re.search(r"has less than 0\.00\d+ GB left", caplog.text)


def test_a_disk_that_is_full_after_all_is_named_and_nothing_is_left(stock, tmp_path, monkeypatch):
    def fail(path, tensors):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(node_loading, "write_mappable", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(ValueError, match=r"The copy that the processes of '.+' share cannot be written.*No space left"):
        load_shared(stock, dtype="auto", processes=Two(rank=0, size=2))
    assert os.listdir(tmp_path) == ["stock"]


def test_what_a_killed_process_left_is_removed_and_the_others_stay(stock, tmp_path, monkeypatch):
    place, host = tmp_path / "temporary", socket.gethostname()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    stay = [f"lightning_moe_{host}_{os.getpid()}_a", f"lightning_moe_elsewhere_{dead.pid}_a", "lightning_moe_notes"]
    for name in (*stay, f"lightning_moe_{host}_{dead.pid}_a"):
        (place / name).mkdir(parents=True)
    monkeypatch.setattr("tempfile.tempdir", str(place))
    load_shared(stock, dtype="auto", processes=Two(rank=0, size=2))
    assert sorted(os.listdir(place)) == sorted(stay)


def test_ddp_sends_what_is_trained_or_was_made_since_it_was_loaded():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4, bias=False)).requires_grad_(False)
    loaded = storages_of(model)
    model[0].bias.requires_grad_()
    model[1].weight = nn.Parameter(torch.zeros(4, 4), requires_grad=False)
    leave_frozen_alone(model, loaded=loaded)
    assert model._ddp_params_and_buffers_to_ignore == ["0.weight", "1.bias", "2.weight"]
    leave_frozen_alone(model, loaded=set())
    assert model._ddp_params_and_buffers_to_ignore == []


def test_written_tensors_lie_where_they_can_be_used(tmp_path):
    tensors = {
        "odd": torch.arange(3, dtype=torch.uint8),
        "rows": torch.randn(4, 8).bfloat16(),
        "none": torch.empty(0, 8),
        "one": torch.tensor(2.5),
        "mask": torch.tensor([True, False] * 8),
    }
    write_mappable(tmp_path / "file.safetensors", tensors)
    stored, _ = open_files([tmp_path / "file.safetensors"])
    for name, tensor in tensors.items():
        mapped = map_tensor(stored[name])
        assert (mapped.dtype, mapped.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(mapped, tensor)
        assert tensor.nbytes % 16 or not tensor.nbytes or mapped.data_ptr() % 16 == 0
    mapped = map_tensor(stored["rows"])
    mapped.zero_()  # a copy of its own
    assert torch.equal(map_tensor(stored["rows"]), tensors["rows"])
    os.utime(tmp_path / "file.safetensors", (0, 0))
    with pytest.raises(ValueError, match=r"file\.safetensors' was changed while it was being read. Start again"):
        map_tensor(stored["rows"])
