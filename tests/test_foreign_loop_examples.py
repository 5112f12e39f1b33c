"""The examples run, and do what they say. (That the README shows their lines is a test of the documentation.)"""

import importlib
import json
import sys
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_moe.models.discovery import expert_widths, moe_layers

pytestmark = [
    pytest.mark.foreign_loop,
    pytest.mark.filterwarnings("ignore:.*litlogger.*"),
]

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "scripts" / "examples"
NAMES = ("lightning_loop", "pytorch_loop", "transformers_trainer")
# The shipped model: 6 layers of 16 experts of 128 channels, hidden 128; a channel is one row of three matrices.
NUM_CHANNELS, NUM_PARAMETERS, HIDDEN = 6 * 16 * 128, 5_552_128, 128


@pytest.fixture
def full_example(monkeypatch):
    """Imports an example, and forgets it afterwards."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module
    for name in ("shipped", *NAMES):
        sys.modules.pop(name, None)


@pytest.fixture
def example(full_example, monkeypatch):
    """The same with rows of 16 tokens instead of 128."""
    shipped = full_example("shipped")
    all_rows = cache(partial(shipped.text_rows, count=10_000, length=16))
    monkeypatch.setattr(shipped, "text_rows", lambda split, *, count, length=128: all_rows(split)[:count])
    return full_example


def sizes_by_hand(model):
    """Channels and parameters counted on the tensors, and the parameters that the widths and the routers leave."""
    layers = moe_layers(model)
    num_channels = sum(len(layer.experts.gate_proj.weight) for layer in layers)
    num_evicted = sum(16 - len(layer.router.weight) for layer in layers)
    expected = NUM_PARAMETERS - 3 * HIDDEN * (NUM_CHANNELS - num_channels) - HIDDEN * num_evicted
    return num_channels, sum(p.numel() for p in model.parameters()), expected


def check_rows(rows, model, *, steps):
    assert [row["step"] for row in rows] == [steps // 4, steps // 2, steps]
    assert [row["channels"] for row in rows] == [NUM_CHANNELS * 3 // 4, NUM_CHANNELS // 2, NUM_CHANNELS // 2]
    assert sizes_by_hand(model) == (rows[-1]["channels"], rows[-1]["parameters"], rows[-1]["parameters"])
    assert rows[0]["parameters"] > rows[1]["parameters"] == rows[2]["parameters"]
    # Training after each cut moved the model.
    assert rows[0]["after"] != rows[1]["before"]
    assert rows[1]["after"] != rows[2]["before"]
    assert all(2 < value < 8 for row in rows for key, value in row.items() if key in ("before", "after", "unpruned"))


def check_folder(folder, model):
    widths = json.loads((folder / "config.json").read_text())["quantization_config"]["widths"]
    assert [tuple(values) for values in widths.values()] == [layer.experts.widths for layer in moe_layers(model)]
    reloaded = AutoModelForCausalLM.from_pretrained(folder)
    expected = model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in reloaded.state_dict().items())


@pytest.mark.parametrize("flags", [(), ("--manual", "--experts")], ids=" ".join)
def test_lightning(example, tmp_path, capsys, flags):
    rows, module = example("lightning_loop").main(["--steps", "8", "--folder", str(tmp_path / "model"), *flags])
    check_rows(rows, module.lm, steps=8)
    check_folder(tmp_path / "model", module.lm)
    # Up to the first cut the two runs are one, but for the form in which the experts are computed.
    assert rows[0]["before"] == pytest.approx(rows[0]["unpruned"], abs=1e-4)
    assert rows[0]["after"] > rows[0]["before"]
    if "--experts" in flags:
        assert any(len(layer.router.weight) <= 12 for layer in moe_layers(module.lm))
    printed = capsys.readouterr().out
    assert f"{rows[-1]['parameters']:,}" in printed
    assert f"held-out loss {rows[-1]['before']:.4f}." in printed


def test_pytorch(example, tmp_path, capsys):
    rows, model = example("pytorch_loop").main(["--steps", "8", "--folder", str(tmp_path)])
    check_rows(rows, model, steps=8)
    check_folder(tmp_path / "model", model)
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == 3  # between the cuts at 2 and 4
    assert len(checkpoint["pruner"]["plans"]) == 1
    printed = capsys.readouterr().out
    assert "the weights at the end are equal." in printed
    assert f"held-out loss {rows[-1]['before']:.4f}." in printed


def test_transformers(example, tmp_path, capsys):
    rows, model = example("transformers_trainer").main(["--steps", "8", "--folder", str(tmp_path)])
    check_rows(rows, model, steps=8)
    check_folder(tmp_path / "checkpoint-8", model)
    between = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3")
    assert sum(sum(expert_widths(layer.experts)) for layer in moe_layers(between)) == NUM_CHANNELS * 3 // 4
    printed = capsys.readouterr().out
    assert "the weights at the end are equal." in printed
    assert "checkpoint-3 alone: 9,216 channels." in printed


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_at_full_length_training_makes_up_for_part_of_the_cut(full_example, tmp_path, name):
    rows, _ = full_example(name).main(["--folder", str(tmp_path / "model")])
    assert rows[-1]["before"] < rows[-2]["after"]


@pytest.mark.parametrize("name", NAMES)
def test_help_says_what_it_shows_and_the_command(example, capsys, name):
    with pytest.raises(SystemExit, match="0"):
        example(name).main(["--help"])
    printed = capsys.readouterr().out
    assert f"python scripts/examples/{name}.py" in printed
    assert "--steps" in printed


@pytest.mark.parametrize("name", [*NAMES, "shipped"])
def test_examples_are_short(name):
    assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) < 120
