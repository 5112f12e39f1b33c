"""Two processes prune together: the same folder as one, and an error of one is heard by both."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from alike_channels import alike_model
from family_cases import EVICTED
from random_plans import random_plan
from safetensors.torch import load_file, save_file
from streamed_pruning import digests, prune_streamed, tensors_of

from lightning_moe.models.loading import load_model

pytestmark = pytest.mark.multiprocess
SIZE = 2


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    for name in ("stock", "damaged"):
        alike_model("deepseek_v2", noise=0.05).save_pretrained(folder / name)
    random_plan(load_model(str(folder / "stock")), evicted=EVICTED).save(folder / "plan.json")
    file = folder / "damaged" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.experts.3.up_proj.weight"].view(-1)[7] = float("nan")  # the second process reads it
    save_file(tensors, file, metadata={"format": "pt"})
    script = str(Path(__file__).with_name("prune_processes_run.py"))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    started = [
        subprocess.Popen([sys.executable, script, str(folder), str(rank), str(SIZE)], stderr=-1, env=environment)
        for rank in range(SIZE)
    ]
    errors = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [0] * SIZE, b"\n".join(errors)[-3000:].decode()
    return folder, [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(SIZE)]


def plan_of(folder):
    return random_plan(load_model(str(folder / "stock")), evicted=EVICTED)


def test_without_repair_they_take_the_shards_in_turn(found) -> None:
    folder, ranks = found
    taken = [[index for out, index in rank["written"] if out == "cut"] for rank in ranks]
    assert taken == [[0, 2], [1, 3]]
    prune_streamed(str(folder / "stock"), folder / "alone", plan=plan_of(folder), quantize=True)
    assert digests(folder / "cut") == digests(folder / "alone")


def test_with_repair_they_share_the_text_and_the_first_one_writes(found) -> None:
    folder, ranks = found
    taken = [[index for out, index in rank["written"] if out == "repaired"] for rank in ranks]
    assert taken == [[0, 1, 2, 3], []]
    prune_streamed(str(folder / "stock"), folder / "alone_16", plan=plan_of(folder), quantize=False, repair=True)
    own, other = tensors_of(folder / "repaired"), tensors_of(folder / "alone_16")
    assert own.keys() == other.keys()
    for name, value in other.items():
        if "down_proj" in name:  # Grams are added up in another order
            torch.testing.assert_close(own[name], value, rtol=1e-3, atol=1e-5, msg=name)
        else:
            assert torch.equal(own[name], value), name


def test_both_hear_of_the_damage_that_one_met(found) -> None:
    folder, ranks = found
    assert ranks[0]["message"] == ranks[1]["message"]
    assert (
        "damaged/model.safetensors' holds NaN or infinity in 'model.layers.1.mlp.experts.3.up_" in ranks[0]["message"]
    )
    assert not (folder / "refused").exists()
    assert sorted(path.name for path in folder.glob("*.partial")) == ["refused.partial"]
