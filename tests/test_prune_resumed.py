"""Pruning layer by layer that was interrupted: finished shards stay, and the folder is that of an unbroken run."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from alike_channels import alike_model
from family_cases import EVICTED
from prune_killed_run import POINTS
from random_plans import random_plan
from streamed_pruning import SHARD, digests, prune_streamed

from lightning_moe.export import partial
from lightning_moe.export.shards import ShardedWriter
from lightning_moe.models.loading import load_model
from lightning_moe.surgery.folder_cut import FolderCut

NAME = "deepseek_v2"  # one dense layer, two of experts: four shards


class Interruption(Exception):  # noqa: N818
    """Not a ValueError: nobody handles it."""


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resumed") / "stock"
    alike_model(NAME, noise=0.05).save_pretrained(folder, max_shard_size=SHARD)
    return folder


@pytest.fixture(scope="module")
def plan(stock):
    return random_plan(load_model(str(stock)), evicted=EVICTED)


@pytest.fixture(scope="module", params=[False, True], ids=["cut", "repaired"])
def unbroken(request, stock, plan):
    """Settings, and the files they lead to."""
    options = {"plan": plan, "quantize": True, "repair": request.param}
    out = stock.parent / f"unbroken_{request.param}"
    prune_streamed(str(stock), out, **options)
    return options, digests(out)


def interrupt(monkeypatch, owner, name, *, call: int) -> None:
    """The call number `call` of a function raises instead."""
    calls, real = [], getattr(owner, name)

    def counted(*args, **kwargs):
        calls.append(args)
        if len(calls) == call + 1:
            raise Interruption
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)


@pytest.mark.parametrize("shard", [0, 1, 2, 3])
def test_after_an_exception_the_finished_shards_stay(shard, unbroken, stock, tmp_path, monkeypatch) -> None:
    options, expected = unbroken
    with monkeypatch.context() as patch:
        interrupt(patch, ShardedWriter, "write", call=shard)
        with pytest.raises(Interruption):
            prune_streamed(str(stock), tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    kept = sorted((tmp_path / "out.partial" / "model").glob("*.safetensors"))
    assert len(kept) == shard
    before = [(path.name, path.stat().st_mtime_ns) for path in kept]
    prune_streamed(str(stock), tmp_path / "out", **options)
    assert digests(tmp_path / "out") == expected
    assert [(name, (tmp_path / "out" / name).stat().st_mtime_ns) for name, _ in before] == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_save_file_leaves_is_removed(unbroken, stock, tmp_path, monkeypatch) -> None:
    """Safetensors writes to a hidden name of its own beside ours, which our cleaning up knows nothing of."""
    options, expected = unbroken
    with monkeypatch.context() as patch:
        interrupt(patch, ShardedWriter, "write", call=1)
        with pytest.raises(Interruption):
            prune_streamed(str(stock), tmp_path / "out", **options)
    for name in (".tmpXy12Ab", ".model-00002-of-00004.safetensors.0123abcd.tmp"):
        (tmp_path / "out.partial" / "model" / name).write_bytes(b"half")
    prune_streamed(str(stock), tmp_path / "out", **options)
    assert digests(tmp_path / "out") == expected


@pytest.mark.parametrize("what", ["write_configs", "write_manifest", "move_into_place"])
def test_interrupted_at_the_end(what, unbroken, stock, tmp_path, monkeypatch) -> None:
    options, expected = unbroken
    with monkeypatch.context() as patch:
        interrupt(patch, partial, what, call=0)
        with pytest.raises(Interruption):
            prune_streamed(str(stock), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(FolderCut, "decoder", None)
    prune_streamed(str(stock), tmp_path / "out", **options)
    assert digests(tmp_path / "out") == expected


def test_killed_at_many_points(unbroken, stock, tmp_path) -> None:
    options, expected = unbroken
    options["plan"].save(tmp_path / "plan.json")
    script = str(Path(__file__).with_name("prune_killed_run.py"))
    points = [point for point in POINTS if options["repair"] or point != "gram"]
    command = [sys.executable, script, str(stock), str(tmp_path), str(int(options["repair"])), *points]
    ended = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert ended == [str(signal.SIGKILL.value)] * len(points)
    for point in points:
        out = tmp_path / point
        assert out.exists() == (point == "named")
        assert (tmp_path / f"{point}.partial").exists()
        prune_streamed(str(stock), out, **options)
        assert digests(out) == expected, point
        assert not list(tmp_path.glob(f"{point}.partial")) + list(out.glob(".*"))


def test_an_older_folder_stays_until_the_new_one_is_whole(unbroken, stock, tmp_path, monkeypatch) -> None:
    options, expected = unbroken
    out = tmp_path / "out"
    prune_streamed(str(stock), out, plan=None, quantize=False)
    (out / "notes.txt").write_text("of the older one")
    older = digests(out)
    with monkeypatch.context() as patch:
        interrupt(patch, ShardedWriter, "write", call=2)
        with pytest.raises(Interruption):
            prune_streamed(str(stock), out, **options)
    assert digests(out) == older
    prune_streamed(str(stock), out, **options)
    assert digests(out) == expected
    assert os.listdir(tmp_path) == ["out"]


def test_another_run_does_not_take_up_its_shards(stock, plan, tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, ShardedWriter, "write", call=2)
        with pytest.raises(Interruption):
            prune_streamed(str(stock), tmp_path / "out", plan=plan, quantize=True)
    other = random_plan(load_model(str(stock)), seed=1)
    for options, what in (
        ({"plan": other, "quantize": True}, f"plan was '{plan.digest}', is '{other.digest}'"),
        ({"plan": plan, "quantize": False}, "quantize was 'nf4', is 'none'"),
        ({"plan": plan, "quantize": True, "repair": True}, "repair was 'False', is 'True'"),
        ({"plan": plan, "quantize": True, "dtype": "bfloat16"}, "dtype was 'auto', is 'bfloat16'"),
    ):
        source = str(stock)
        if "dtype" in options:  # the routers' digest does not tell float32 from its own rounding
            options["plan"] = plan
        with pytest.raises(ValueError, match=f"left by another run: .*{what}"):
            prune_streamed(source, tmp_path / "out", **options)
    prune_streamed(str(stock), tmp_path / "out", plan=plan, quantize=True)
    assert os.listdir(tmp_path) == ["out"]


def test_a_shard_of_the_source_that_was_written_anew_in_between_is_noticed(plan, stock, tmp_path, monkeypatch) -> None:
    model = alike_model(NAME, noise=0.05)
    model.save_pretrained(tmp_path / "stock")
    with monkeypatch.context() as patch:
        interrupt(patch, ShardedWriter, "write", call=2)
        with pytest.raises(Interruption):
            prune_streamed(str(tmp_path / "stock"), tmp_path / "out", plan=plan, quantize=True)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "stock")
    with pytest.raises(ValueError, match="left by another run: checkpoint was"):
        prune_streamed(str(tmp_path / "stock"), tmp_path / "out", plan=plan, quantize=True)
