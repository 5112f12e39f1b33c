"""How much memory is left: of the machine, of the control groups around the process, of its own limits."""

import resource
from types import SimpleNamespace

import psutil
import pytest

from lightning_moe import machine
from lightning_moe.machine import available_memory

GIB = 2**30


@pytest.fixture(autouse=True)
def free(monkeypatch):
    """A machine with 64 GiB left and no limit of the process."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=64 * GIB))
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def group(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("memory_", "memory.")).write_text(f"{content}\n")


def test_without_limits_it_is_the_machine(tmp_path):
    assert available_memory(mount=tmp_path, own="") == available_memory(mount=tmp_path, own="0::/x\n") == 64 * GIB
    group(tmp_path, memory_max="max", memory_current=GIB)
    assert available_memory(mount=tmp_path, own="0::/\n") == 64 * GIB


def test_the_tightest_group_around_the_process_counts(tmp_path):
    group(tmp_path / "outer", memory_max=16 * GIB, memory_current=10 * GIB)
    group(tmp_path / "outer" / "inner", memory_max=8 * GIB, memory_current=GIB)
    group(tmp_path / "other", memory_max=1, memory_current=0)
    assert available_memory(mount=tmp_path, own="0::/outer/inner\n") == 6 * GIB
    group(tmp_path / "outer" / "inner", memory_current=3 * GIB)
    assert available_memory(mount=tmp_path, own="0::/outer/inner\n") == 5 * GIB
    group(tmp_path / "outer" / "inner", memory_current=9 * GIB)
    assert available_memory(mount=tmp_path, own="0::/outer/inner\n") == 0


def test_inside_a_container_the_root_is_its_own_group(tmp_path):
    group(tmp_path, memory_max=4 * GIB, memory_current=GIB)
    assert available_memory(mount=tmp_path, own="0::/not/mounted/here\n") == 3 * GIB


def test_pages_of_files_make_room(tmp_path):
    """A folder that was just written fills the page cache, which the kernel gives back."""
    group(tmp_path, memory_max=4 * GIB, memory_current=4 * GIB, memory_stat=f"anon 5\ninactive_file {2 * GIB}")
    assert available_memory(mount=tmp_path, own="0::/\n") == 2 * GIB


def test_version_1(tmp_path):
    limits = {"memory_limit_in_bytes": 4 * GIB, "memory_usage_in_bytes": 3 * GIB}
    group(tmp_path / "memory" / "job", **limits, memory_stat=f"inactive_file 1\ntotal_inactive_file {GIB}")
    own = "5:cpu:/job\n4:memory,hugetlb:/job\n"
    assert available_memory(mount=tmp_path, own=own) == 2 * GIB
    assert available_memory(mount=tmp_path, own="5:cpu:/job\n") == 64 * GIB


@pytest.mark.parametrize(("kind", "name"), [(resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")])
def test_limits_of_the_process(kind, name, tmp_path, monkeypatch):
    (tmp_path / "status").write_text(f"Name:\tpython\nVmPeak:\t 9 kB\n{name}:\t {2**20} kB\nThreads:\t1\n")
    monkeypatch.setattr(machine, "_STATUS", tmp_path / "status")
    limits = {kind: 3 * GIB}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits.get(kind, resource.RLIM_INFINITY), -1))
    assert available_memory(mount=tmp_path, own="") == 2 * GIB


def test_the_machine_at_hand():
    assert 0 < available_memory() <= 64 * GIB
