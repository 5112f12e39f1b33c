"""Checkpoints in a quantisation that is not read: refused by name at every entry."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from cli_runs import quickstart, run, save_job
from random_plans import random_plan
from tiny_models import random_tokens, tiny_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lightning_moe.calibration.processes import ALONE
from lightning_moe.export.folders import open_folder
from lightning_moe.export.huggingface import save_ragged
from lightning_moe.models.loading import can_stream, load_model, read_config
from lightning_moe.models.streaming import StockFolder
from lightning_moe.quantization.size import read_sizes
from lightning_moe.surgery.cut import convert_experts
from lightning_moe.training.distillation import load_teacher
from lightning_moe.training.model_source import ModelSource

LINEAR = "model.layers.0.self_attn.q_proj"
NOT_READ: list[dict[str, Any]] = [
    {"quant_method": "gptq", "bits": 4},
    {"quant_method": "awq", "bits": 4},
    {"quant_method": "compressed-tensors"},
    {"quant_method": "mxfp4"},
    {"quant_method": "fbgemm_fp8"},
    {"quant_method": "a_method_of_2031"},
    {"quant_method": "bitsandbytes", "load_in_8bit": True},
    {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
]
TOLD = (
    r"^'.*' is quantised with '{}' \(`quantization_config` of its config.json\), which is not read. Supported: weights "
    r"in 16 or 32 bit, .*\('fp8'\), .*\('channel_moe'\), .*\('bitsandbytes'\). Take the checkpoint that it was "
    r"quantised from.$"
)


def load_source(source: str) -> Any:
    return ModelSource(source, dtype="auto", from_scratch=False).load(processes=ALONE, in_shares=False)


ENTRIES = {
    "read_config": read_config,
    "load_model": load_model,
    "can_stream": can_stream,
    "open_folder": open_folder,
    "StockFolder": StockFolder,
    "read_sizes": lambda source: read_sizes(source, bits=4),
    "fit": load_source,
    "teacher": lambda source: load_teacher(source, dtype="auto", quantize="nf4", processes=ALONE),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """16-bit weights, which transformers would load under most of these configs."""
    path = tmp_path_factory.mktemp("quantised")
    tiny_model().save_pretrained(path)
    return path


def quantised(folder: Path, settings: dict[str, Any]) -> str:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"quantization_config": settings}))
    return str(folder)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("settings", NOT_READ, ids=lambda settings: "-".join(map(str, settings.values())))
def test_a_quantisation_that_is_not_read_is_refused_by_name(folder, entry, settings) -> None:
    source = quantised(folder, settings)
    with pytest.raises(ValueError, match=TOLD.format(settings["quant_method"])):
        ENTRIES[entry](source)


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Path:
    """A model whose config claims such a quantisation, a plan for it, text, and `data.yaml`."""
    path = save_job(tmp_path_factory.mktemp("job"))
    random_plan(load_model(str(path / "model"))).save(path / "plan.json")
    quantised(path / "model", {"quant_method": "a_method_of_2031"})
    return path


@pytest.mark.parametrize("command", ["calibrate", "prune", "export", "evaluate", "fit"])
def test_commands_say_it_in_one_line(job, tmp_path, capsys, command) -> None:
    data, model = ["--config", job / "data.yaml"], ["--model", job / "model"]
    arguments = {
        "calibrate": [*data, *model, "--out", tmp_path / "statistics.safetensors"],
        "prune": [*data, *model, "--out", tmp_path / "cut", "--plan", job / "plan.json"],
        "export": [*model, "--out", tmp_path / "out", "--formats", "[nf4]"],
        "evaluate": [*data, *model, "--out", tmp_path / "out", "--name", "own"],
    }
    with pytest.raises(SystemExit):
        quickstart(job) if command == "fit" else run(command, *arguments[command])
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(
        f"python -m lightning_moe: {command}: '{job / 'model'}' is quantised with 'a_method_of_2031'"
    )


def test_to_evaluate_it_transformers_reads_what_it_can(folder, tmp_path) -> None:
    """Some 8-bit model beside the cut ones in a table; one of no known quantisation would be read as if it had none."""
    source = packed_by_bitsandbytes(tmp_path, BitsAndBytesConfig(load_in_8bit=True))
    assert isinstance(load_model(source, any_family=True).get_submodule(LINEAR), Linear8bitLt)
    with pytest.raises(ValueError, match=TOLD.format("a_method_of_2031")):
        load_model(quantised(folder, {"quant_method": "a_method_of_2031"}), any_family=True)


def packed_by_bitsandbytes(folder: Path, settings: BitsAndBytesConfig) -> str:
    tiny_model().save_pretrained(folder / "stock")
    model = AutoModelForCausalLM.from_pretrained(folder / "stock", quantization_config=settings)
    model.save_pretrained(folder / "packed")
    return str(folder / "packed")


def test_nf4_of_bitsandbytes_is_read_whole_and_written_again(tmp_path) -> None:
    """What the message promises: it loads, is converted, and comes back from disk tensor by tensor."""
    packing = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    source = packed_by_bitsandbytes(tmp_path, packing)
    model = load_model(source)
    assert isinstance(model.get_submodule(LINEAR), Linear4bit)
    convert_experts(model)
    save_ragged(model, tmp_path / "written")
    again = load_model(str(tmp_path / "written"))
    expected = model.state_dict()
    assert again.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())
    assert torch.isfinite(again(input_ids=random_tokens(batch=1)).logits).all()
    with pytest.raises(ValueError, match=r"is quantised with 'bitsandbytes' .* which is not read. Supported: "):
        open_folder(source)
    assert not can_stream(source)
