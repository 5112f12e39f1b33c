"""What pruning layer by layer refuses or survives: one line that names the file, and nothing under the final name."""

import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from family_cases import EVICTED
from random_plans import random_plan
from safetensors.torch import load_file, save_file
from streamed_pruning import SHARD, digests, prune_streamed, random_novices, text
from tiny_models import tiny_model

from lightning_moe.commands.pruning import prune
from lightning_moe.export import costs
from lightning_moe.export.folders import open_folder
from lightning_moe.export.streaming import prune_folder
from lightning_moe.models.folders import LayerFolder
from lightning_moe.models.loading import load_model

KINDS = [{"repair": False}, {"repair": True}]


@pytest.fixture
def stock(tmp_path) -> Path:
    tiny_model().save_pretrained(tmp_path / "stock", max_shard_size=SHARD)
    return tmp_path / "stock"


@pytest.fixture
def plan(stock):
    return random_plan(load_model(str(stock)), evicted=EVICTED)


def nothing_written(folder: Path) -> bool:
    return sorted(path.name for path in folder.iterdir()) == ["stock"]


@pytest.mark.parametrize("kind", KINDS, ids=["cut", "repaired"])
def test_a_value_that_is_no_number_is_named_and_can_be_mended(kind, stock, plan, tmp_path) -> None:
    key = "model.layers.1.mlp.experts.3.down_proj.weight"
    (file,) = (file for file in stock.glob("*.safetensors") if key in load_file(file))
    whole = load_file(file)
    spoilt = {name: value.clone() for name, value in whole.items()}
    spoilt[key][3, 3] = float("nan")
    save_file(spoilt, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"'{file}' holds NaN or infinity in '{key}'"):
        prune_streamed(str(stock), tmp_path / "out", plan=plan, quantize=True, **kind)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial" / "model" / "model-00001-of-00003.safetensors").is_file()
    save_file(whole, file, metadata={"format": "pt"})
    prune_streamed(str(stock), tmp_path / "out", plan=plan, quantize=True, **kind)
    prune_streamed(str(stock), tmp_path / "again", plan=plan, quantize=True, **kind)
    assert digests(tmp_path / "out") == digests(tmp_path / "again")


def test_a_truncated_shard_is_refused_before_the_first_layer(stock, plan, tmp_path) -> None:
    file = sorted(stock.glob("*.safetensors"))[4]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"'{file}' is not a readable file of weights"):
        prune_streamed(str(stock), tmp_path / "out", plan=plan, quantize=True)
    assert nothing_written(tmp_path)


@pytest.mark.parametrize(
    ("repair", "match", "num_shards"),
    [
        (False, r"model/model-00003-of-00003.safetensors' cannot be written: .*too large", 2),
        (True, r"hidden states '.*/out.partial/inputs_00000.rank0.bin' cannot be written: .*too large", 0),
    ],
)
def test_a_disk_that_fills_up_midway(repair, match, num_shards, stock, plan, tmp_path) -> None:
    """No file may be larger than 50 kB: the last shard, of embeddings and head, is, and so are hidden states."""
    options = {"plan": plan, "quantize": True, "repair": repair}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(ValueError, match=match):
            prune_streamed(str(stock), tmp_path / "out", **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "out").exists()
    shards = sorted((tmp_path / "out.partial" / "model").iterdir())
    assert [path.name for path in shards] == [
        f"model-0000{index + 1}-of-00003.safetensors" for index in range(num_shards)
    ]
    prune_streamed(str(stock), tmp_path / "out", **options)
    prune_streamed(str(stock), tmp_path / "again", **options)
    assert digests(tmp_path / "out") == digests(tmp_path / "again")


def test_too_small_a_disk_is_refused_at_once(stock, plan, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(costs.shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    monkeypatch.setattr(LayerFolder, "load_decoder", None)
    with pytest.raises(ValueError, match=rf"'{tmp_path}/out' needs 0.000\d+ GB more in '{tmp_path}', .*0.0001 GB are"):
        prune_streamed(str(stock), tmp_path / "out", plan=plan, quantize=False)
    assert nothing_written(tmp_path)


def test_an_index_or_config_that_cannot_be_written(stock, plan, tmp_path, monkeypatch) -> None:
    def full(folder):
        raise OSError(28, "No space left on device")

    with pytest.raises(ValueError, match=f"'{tmp_path}/out.partial/model' cannot be completed: .*No space left on"):
        prune_streamed(str(stock), tmp_path / "out", plan=plan, quantize=True, beside=full)
    assert not (tmp_path / "out").exists()
    prune_streamed(str(stock), tmp_path / "out", plan=plan, quantize=True)


def test_a_finished_shard_that_was_damaged_since_is_written_again(stock, plan, tmp_path, caplog) -> None:
    prune_streamed(str(stock), tmp_path / "whole", plan=plan, quantize=True)

    def stop(folder):
        raise OSError("stop")

    with pytest.raises(ValueError, match="stop"):
        prune_streamed(str(stock), tmp_path / "out", plan=plan, quantize=True, beside=stop)
    shard = tmp_path / "out.partial" / "model" / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    prune_streamed(str(stock), tmp_path / "out", plan=plan, quantize=True)
    assert f"'{shard}' of an interrupted run is damaged and is written again" in caplog.text
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_a_plan_of_another_checkpoint_is_refused_before_the_first_layer(stock, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(LayerFolder, "load_decoder", None)
    other = random_plan(tiny_model(seed=1))
    with pytest.raises(ValueError, match="made for another model: router_digest of model is"):
        prune_streamed(str(stock), tmp_path / "out", plan=other, quantize=True)
    assert nothing_written(tmp_path)


def test_what_does_not_fit_together_is_refused(stock, plan, tmp_path) -> None:
    def refused(match, **options):
        with pytest.raises(ValueError, match=match):
            prune_streamed(str(stock), tmp_path / "out", **({"plan": plan, "quantize": True} | options))

    refused("fits to 4-bit weights, got `quantize: none`", quantize=False, repair="after_nf4")
    refused("novices were made for plan", novices=random_novices(random_plan(tiny_model(), seed=1)))
    refused(r"`memory_gb` must be at least .*got 1e-09", repair=True, memory_gb=1e-9)
    with pytest.raises(ValueError, match="`repair: True` needs text, got none"):
        prune_folder(open_folder(str(stock)), plan=plan, out=tmp_path / "out", quantize=True, repair=True)
    tiny_model(hidden_size=96).save_pretrained(tmp_path / "odd")
    with pytest.raises(ValueError, match="a hidden size that is a multiple of 64, got 96"):
        prune_streamed(str(tmp_path / "odd"), tmp_path / "out", plan=None, quantize=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="file' is a file; a model needs a folder"):
        prune_streamed(str(stock), tmp_path / "file", plan=plan, quantize=True)


def by_command(source: Path, folder: Path, plan, **options) -> None:
    plan.save(folder / "plan.json")
    data = SimpleNamespace(
        calibration_dataloaders=text,
        tokenizer=SimpleNamespace(save_pretrained=lambda out: (out / "tokenizer.json").write_text("{}")),
    )
    named = {"model": str(source), "plan": str(folder / "plan.json"), "out": str(folder / "out")}
    prune(data=data, device="cpu", **named, **options)


def test_the_command_refuses_what_cannot_be_read_layer_by_layer(stock, plan, tmp_path) -> None:
    (stock / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is an adapter, not a model\. Merge it into its model first"):
        by_command(stock, tmp_path, plan)
    (stock / "adapter_config.json").unlink()
    torch.save(tiny_model().state_dict(), stock / "pytorch_model.bin")
    for file in (*stock.glob("*.safetensors"), stock / "model.safetensors.index.json"):
        file.unlink()
    with pytest.raises(ValueError, match="safetensors"):
        by_command(stock, tmp_path, plan)
    with pytest.raises(ValueError, match="`repair_memory_gb` must be a number of GB above 0, got 0"):
        by_command(stock, tmp_path, plan, repair_memory_gb=0)
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_it_will_take_and_what_it_wrote(stock, plan, tmp_path, caplog) -> None:
    with caplog.at_level("INFO"):
        by_command(stock, tmp_path, plan)
    before = next(line for line in caplog.messages if "expected peak memory" in line)
    assert f"'{tmp_path}/out' (0 are there)" in before
    size = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert caplog.messages[-1].startswith(f"Model written to '{tmp_path}/out': {size:,} bytes, ")
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert any(line.startswith("Repair of W_down") and len(line.splitlines()) == 4 for line in caplog.messages)
