"""Decoder layers one at a time: the same hidden states as the whole model, room on the disk, messages."""

import io
import logging
import shutil
from collections import namedtuple
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from interrupted_calibrations import loaders
from safetensors.torch import load_file
from tiny_models import FAMILY_NAMES, random_tokens, tiny_model

from lightning_moe.calibration import hidden_states, layer_walk
from lightning_moe.calibration.collector import CalibrationCollector, collect_statistics
from lightning_moe.calibration.hidden_states import read_hidden_states, writing_hidden_states
from lightning_moe.calibration.layer_walk import LayerWalk
from lightning_moe.calibration.memory import KERNEL_BYTES, LIBRARY_BYTES
from lightning_moe.calibration.streamed import collect_streamed
from lightning_moe.models.discovery import moe_layers
from lightning_moe.models.loading import load_model
from lightning_moe.models.streaming import StockFolder
from lightning_moe.surgery.cut import convert_experts

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def source(tmp_path) -> str:
    tiny_model("deepseek_v3").save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def walk(source: str, workspace: Path, **options) -> LayerWalk:
    workspace.mkdir(exist_ok=True)
    return LayerWalk(StockFolder(source), loaders=loaders(), workspace=workspace, progress=False, **options)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_hidden_states_are_those_of_the_whole_model(name, tmp_path) -> None:
    tiny_model(name).save_pretrained(tmp_path / "model")
    model = load_model(str(tmp_path / "model"))
    convert_experts(model)
    streamed = walk(str(tmp_path / "model"), tmp_path / "work")
    layers = [model.get_submodule(one) for one in streamed.names]
    for step, layer in zip(streamed, layers, strict=True):
        assert (step.moe is None) == (step.name not in {one.block_name.rpartition(".")[0] for one in moe_layers(model)})
        outputs = []
        with torch.no_grad(), layer.register_forward_hook(lambda *args, to=outputs: to.append(args[-1])):
            for batches in loaders().values():
                for batch in batches:
                    model.get_decoder()(**batch, use_cache=False)
        seen = []
        with streamed.folder.model.get_submodule(step.name).register_forward_hook(
            lambda *args, to=seen: to.append(args[-1])
        ):
            step.run()
        assert len(seen) == len(outputs) == 3
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(seen, outputs, strict=True))


def test_a_layer_runs_as_often_as_it_is_asked_to(source, tmp_path) -> None:
    steps = iter(walk(source, tmp_path / "work"))
    next(steps).run()
    step, kept = next(steps), []
    for keep in (True, False, False):
        batches = []
        step.run(batch=lambda corpus, inputs, to=batches: _noted(to, corpus, inputs), keep=keep)
        kept.append((tmp_path / "work" / "inputs_00002.rank0.bin").read_bytes())
        assert [(corpus, tuple(shape)) for corpus, shape in batches] == [("a", (2, 12)), ("a", (3, 16)), ("b", (2, 16))]
    assert kept[0] == kept[1] == kept[2]


class _noted:  # noqa: N801
    def __init__(self, to, corpus, inputs) -> None:
        to.append((corpus, inputs["input_ids"].shape))

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def test_only_the_layer_at_hand_is_in_memory(source, tmp_path) -> None:
    streamed = walk(source, tmp_path / "work")
    held = []
    for step in streamed:
        step.run()
        held.append(step.moe)
        loaded = [
            name for name, value in streamed.folder.model.named_parameters() if value.numel() and not value.is_meta
        ]
        assert loaded
        assert all(name.startswith(f"{step.name}.") for name in loaded)
    assert all(value.is_meta for value in streamed.folder.model.parameters())
    # Who holds on to a layer that is done holds no memory.
    assert sum(value.nbytes for layer in held[1:] for value in layer.block.parameters() if not value.is_meta) == 0


def test_nan_is_reported_with_layer_corpus_and_batch(source, tmp_path, monkeypatch) -> None:
    original = CalibrationCollector.end_layer
    calls = []

    def spoiled(self, layer, output_TH):
        calls.append(layer)
        original(self, layer, output_TH * float("nan") if len(calls) == 5 else output_TH)

    monkeypatch.setattr(CalibrationCollector, "end_layer", spoiled)
    with pytest.raises(ValueError, match=r"layers.2.mlp.experts: NaN or infinity in batch 2 of corpus 'a'"):
        collect_streamed(StockFolder(source), loaders=loaders(), workspace=tmp_path / "work", progress=False)


def test_a_collector_of_some_layers_takes_what_one_of_all_takes() -> None:
    model, ids = tiny_model("mixtral", num_hidden_layers=3), random_tokens()
    whole = collect_statistics(model, loaders={"a": [{"input_ids": ids}]}, progress=False)
    with CalibrationCollector(model, layers=moe_layers(model)[1:2]) as collector, collector.batch(corpus="a"):
        model.get_decoder()(input_ids=ids, use_cache=False)
    ((sums,),) = collector.sums().values()
    assert sums.keys() == whole.corpora["a"][1].keys()
    for name, value in whole.corpora["a"][1].items():  # the layer before is computed by the model itself here
        torch.testing.assert_close(sums[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "text", [{}, {"a": []}, {"a": [{"input_ids": random_tokens(), "attention_mask": torch.zeros(2, 16)}]}]
)
def test_text_without_a_token_is_refused(text, source, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"at least one corpus|has no batch|has only padding"):
        LayerWalk(StockFolder(source), loaders=text, workspace=tmp_path)


def test_a_disk_without_room_is_refused_before_anything_runs(source, tmp_path, monkeypatch) -> None:
    streamed = walk(source, tmp_path / "work")
    assert streamed.buffer_bytes == 2 * (2 * 12 + 3 * 16 + 2 * 16) * 64 * 4
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(0, 0, 40_000))
    with pytest.raises(ValueError, match=r"need 5.32e-05 GB in '.*work', and 4e-05 GB are free there. Give another"):
        walk(source, tmp_path / "work")
    # What an interrupted run left there is not needed a second time.
    (tmp_path / "work" / "inputs_00001.rank0.bin").write_bytes(bytes(20_000))
    walk(source, tmp_path / "work")


def test_finished_layers_need_room_too(source, tmp_path, monkeypatch) -> None:
    """The dense one counts as the others do, until it is done."""
    options = {"loaders": loaders(), "progress": False}
    collect_streamed(StockFolder(source), workspace=tmp_path / "first", **options)
    layer_bytes = sum(value.nbytes for value in load_file(tmp_path / "first" / "layer_00002.safetensors").values())
    needed = walk(source, tmp_path / "second").buffer_bytes + 3 * layer_bytes
    for free in (needed - 1, needed):
        monkeypatch.setattr(shutil, "disk_usage", lambda folder, free=free: Usage(0, 0, free))
        refused = pytest.raises(
            ValueError, match=r"GB in '.*second' beside .* of finished layers, and .* are free there"
        )
        with refused if free < needed else nullcontext():
            collect_streamed(StockFolder(source), workspace=tmp_path / "second", **options)
    assert len(list((tmp_path / "second").glob("layer_*"))) == 3


def test_a_full_disk_is_named_and_leaves_no_part_of_a_file(source, tmp_path, monkeypatch) -> None:
    original = hidden_states._write
    calls = []

    def full(file, content):
        calls.append(None)
        if len(calls) == 10:
            raise OSError(28, "No space left on device")
        original(file, content)

    monkeypatch.setattr(hidden_states, "_write", full)
    steps = iter(walk(source, tmp_path / "work"))
    step = next(steps)
    with pytest.raises(ValueError, match=r"inputs_00001.rank0.bin' cannot be written: .*No space left"):
        step.run()
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["inputs_00000.rank0.bin"]


def test_costs_are_said_before_it_starts(source, tmp_path, caplog) -> None:
    with caplog.at_level(logging.INFO, logger="lightning_moe"):
        collect_streamed(StockFolder(source), loaders=loaders(), workspace=tmp_path / "work", progress=False)
    (line,) = (record.message for record in caplog.records)
    assert line.startswith(f"Calibrating 3 decoder layers of '{source}' one at a time: ")
    assert "tokens: a 68, b 32; hidden states of 5.32e-05 GB in '" in line
    assert "; expected peak memory " in line
    folder = StockFolder(source)
    sizes = [folder.decoder_bytes(name) for name in folder.decoder_names]
    always = LIBRARY_BYTES + KERNEL_BYTES + 10**9
    peak = walk(source, tmp_path / "other").peak_bytes(extra_bytes=10**9)
    assert peak == always + max(sizes) + sum(sizes) // 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_hidden_states_come_back_from_a_file(dtype, tmp_path) -> None:
    states = [torch.randn(2, 3, 4).to(dtype), torch.randn(1, 5, 4).to(dtype)]
    with writing_hidden_states(tmp_path / "states") as append:
        for state in states:
            append(state)
        assert not (tmp_path / "states").exists()
    for found, expected in zip(read_hidden_states(tmp_path / "states"), states, strict=True):
        assert found.dtype == dtype
        assert torch.equal(found, expected)


def test_the_bar_says_which_layer_and_counts_batches(source, tmp_path, monkeypatch) -> None:
    bars = []

    class Bar(layer_walk.tqdm):
        def __init__(self, *args, **options) -> None:
            super().__init__(*args, **options | {"disable": False, "file": io.StringIO()})
            bars.append(self)

        def set_description(self, desc=None, refresh=True) -> None:
            super().set_description(desc, refresh)
            bars.append((desc, self.n, self.total))

    monkeypatch.setattr(layer_walk, "tqdm", Bar)
    streamed = walk(source, tmp_path / "work", title="Repairing")
    for step in streamed:
        step.run()
        if step.index == 1:
            step.run(keep=False)
    said = [bar for bar in bars if isinstance(bar, tuple)]
    assert said == [
        ("Repairing: layer 1 of 3", 0, 9),
        ("Repairing: layer 2 of 3", 3, 9),
        ("Repairing: layer 3 of 3", 9, 12),
    ]
