"""Statistics of 4-bit Linear layers that are not those of their weights: bitsandbytes would read beyond its memory."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from torch import Tensor

from lightning_moe.export.folders import open_folder
from lightning_moe.export.huggingface import save_ragged
from lightning_moe.models.loading import load_model
from lightning_moe.quantization.linears import quantize_model
from lightning_moe.surgery.cut import convert_experts

WEIGHT = "model.layers.0.self_attn.q_proj.weight"
DESCRIPTION = f"{WEIGHT}.quant_state.bitsandbytes__nf4"


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    model = tiny_model()
    convert_experts(model)
    quantize_model(model)
    folder = tmp_path_factory.mktemp("packed") / "model"
    save_ragged(model, folder)
    return folder


def refuse(packed: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], match: str) -> None:
    tensors = load_file(packed / "model.safetensors")
    change(tensors)
    for file in packed.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for load in (load_model, open_folder):
        with pytest.raises(ValueError, match=match) as refused:
            load(str(tmp_path))
        assert "model.safetensors'" in str(refused.value)


def shorten(part: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{WEIGHT}.{part}"] = tensors[f"{WEIGHT}.{part}"][:-1].clone()

    return change


def describe(**fields: Any) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        described = json.loads(bytes(tensors[DESCRIPTION].tolist())) | fields
        tensors[DESCRIPTION] = torch.tensor(list(json.dumps(described).encode()), dtype=torch.uint8)

    return change


@pytest.mark.parametrize("part", ["absmax", "nested_absmax", "nested_quant_map", "quant_map"])
def test_too_short_statistics_are_refused(packed, tmp_path, part) -> None:
    refuse(
        packed, tmp_path, shorten(part), rf"q_proj.weight.{part}' in '.*' is (U8|F32) of shape \(\d+,\), but a packed"
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("blocksize", 0),  # divides by it
        ("blocksize", 4096),
        ("blocksize", True),
        ("shape", [64, 2**40]),
        ("shape", [64]),
        ("shape", None),
        ("quant_type", "fp4"),
        ("nested_blocksize", 1),
        ("nested_dtype", "load"),  # an attribute of torch, by name
        ("dtype", "load"),
        ("nested_offset", float("nan")),
        ("nested_offset", "0"),
    ],
)
def test_a_description_of_another_weight_is_refused(packed, tmp_path, field, value) -> None:
    refuse(packed, tmp_path, describe(**{field: value}), rf"does not describe a weight .* in NF4: \['{field}'\] do not")


def test_unknown_fields_are_refused(packed, tmp_path) -> None:
    refuse(packed, tmp_path, describe(code="x"), r"does not describe a weight .* NF4: \[.*'code'.*\] do not fit")


@pytest.mark.parametrize("text", [b"[" * 900, b"{", b"9" * 5000, b"\xff"])
def test_a_description_that_is_no_text_is_refused(packed, tmp_path, text) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[DESCRIPTION] = torch.tensor(list(text), dtype=torch.uint8)

    refuse(packed, tmp_path, change, r"does not describe a weight|is U8 of shape \(5000,\), but a packed weight")


def test_statistics_that_are_missing_or_not_finite_are_refused(packed, tmp_path) -> None:
    refuse(packed, tmp_path, lambda own: own.pop(f"{WEIGHT}.absmax"), r"shards lack '.*q_proj.weight.absmax', which")
    spoil = f"{WEIGHT}.nested_absmax"
    refuse(packed, tmp_path, lambda own: own[spoil].fill_(float("nan")), r"holds NaN or infinity in '.*nested_absmax'")
