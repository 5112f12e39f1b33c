"""Calibration and repair shared by several processes: equal to one process, and errors reach everybody."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes_cases import CALIBRATIONS, Stream, labels_of, mean_loss, message_of, repaired, statistics_of, text
from torch import distributed
from torch.utils.data import DataLoader, DistributedSampler

from lightning_moe.calibration.processes import ALONE, OwnShare, Processes

pytestmark = pytest.mark.multiprocess


@pytest.fixture(autouse=True)
def one_thread():
    """As in the children: another number of threads adds fp32 numbers up in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run_together(folder, *, size):
    """What each of `size` processes found."""
    script = str(Path(__file__).with_name("processes_run.py"))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    started = [
        subprocess.Popen([sys.executable, script, str(folder), str(rank), str(size)], stderr=-1, env=environment)
        for rank in range(size)
    ]
    errors = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [0] * size, b"\n".join(errors)[-3000:].decode()
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(size)]


def check_equal_to_one(found):
    for name in CALIBRATIONS:
        alone = statistics_of(name)
        for corpus, layers in alone.items():
            for index, sums in enumerate(layers):
                for rank in found:
                    shared = rank["statistics"][name][corpus][index]
                    assert shared.keys() == sums.keys()
                    for quantity, value in sums.items():
                        torch.testing.assert_close(shared[quantity], value, rtol=1e-12, atol=0, msg=quantity)
                        assert torch.equal(shared[quantity], found[0]["statistics"][name][corpus][index][quantity])
    alone = repaired()
    assert sum(alone["counts"]) > 0
    for rank in found:
        assert rank["repair"]["counts"] == alone["counts"]
        torch.testing.assert_close(rank["repair"]["errors"], alone["errors"], rtol=1e-8, atol=0)
        for shared, rows, first in zip(rank["repair"]["rows"], alone["rows"], found[0]["repair"]["rows"], strict=True):
            torch.testing.assert_close(shared, rows, rtol=1e-8, atol=1e-10)
            assert torch.equal(shared, first)


def check_errors(found):
    messages = [rank["errors"] for rank in found]
    assert all(one == messages[0] for one in messages)
    assert "layers.1.mlp.experts: NaN or infinity in batch 1 of corpus 'a'" in messages[0]["nan"]
    for name in ("empty", "padding"):
        assert messages[0][name] == message_of(name)


def check_mean_loss(found):
    """What a strategy makes of it, the mean over processes, is the gradient of all rows in one process."""
    mean_CV = torch.stack([rank["gradient"] for rank in found]).mean(0)
    alone_CV = mean_loss(torch.cat([labels_of(rank) for rank in range(len(found))]))
    torch.testing.assert_close(mean_CV, alone_CV, rtol=1e-5, atol=1e-7)
    assert (mean_CV - found[0]["gradient"]).abs().max() > 1e-2


def test_two_processes_give_what_one_gives(tmp_path):
    found = run_together(tmp_path, size=2)
    check_equal_to_one(found)
    check_mean_loss(found)
    check_errors(found)


@pytest.mark.slow
def test_four_processes_give_what_one_gives(tmp_path):
    found = run_together(tmp_path, size=4)
    check_equal_to_one(found)
    check_mean_loss(found)
    check_errors(found)


def test_shares_are_disjoint_and_together_everything():
    items = list(range(11))
    shares = [list(Processes(rank=rank, size=4).share(iter(items))) for rank in range(4)]
    assert sorted(item for share in shares for item in share) == items
    assert [len(share) for share in shares] == [3, 3, 3, 2]


def test_what_is_a_share_already_is_taken_whole():
    class Own(Stream, OwnShare):
        pass

    batches = text(4, seed=0)
    two = Processes(rank=1, size=2)
    own = DataLoader(Own(batches), batch_size=None)
    assert len(list(two.share(own))) == 4
    sampled = DataLoader(batches, batch_size=None, sampler=DistributedSampler(batches, num_replicas=2, rank=1))
    assert len(list(two.share(sampled))) == 2
    assert len(list(two.share(DataLoader(Stream(batches), batch_size=None)))) == 2


def test_one_process_never_asks_for_a_group(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a collective without a group")

    for name in ("all_reduce", "all_gather_object", "get_backend"):
        monkeypatch.setattr(distributed, name, refuse)
    assert Processes.of_default_group() == ALONE
    statistics_of("short")
    repaired()
    assert "Corpus 'none' has no batch" in message_of("empty")
