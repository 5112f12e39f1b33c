"""Checkpoints in 8-bit floating point: dequantised as a hand calculation says, whole and layer by layer."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from layer_folders import assert_equal, walk_and_compare
from safetensors.torch import load_file, save_file
from tiny_models import random_tokens, tiny_model
from torch import Tensor

from lightning_moe.export.folders import open_folder
from lightning_moe.models.fp8 import dequantise
from lightning_moe.models.loading import can_stream, load_model
from lightning_moe.surgery.cut import convert_experts
from lightning_moe.surgery.streaming import quantize_folder

BLOCK = (16, 24)  # divides neither the 48 rows of an MLP nor its 64 columns


def quantised(weight_RC: Tensor, block: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
    """Codes and factors; entry by entry, as the definition says."""
    rows, columns = block or weight_RC.shape
    grid = math.ceil(weight_RC.shape[0] / rows), math.ceil(weight_RC.shape[1] / columns)
    scale, codes_RC = torch.empty(grid), torch.empty_like(weight_RC, dtype=torch.float8_e4m3fn)
    for r in range(grid[0]):
        for c in range(grid[1]):
            part = slice(r * rows, (r + 1) * rows), slice(c * columns, (c + 1) * columns)
            scale[r, c] = weight_RC[part].float().abs().max() / 448
            codes_RC[part] = (weight_RC[part].float() / scale[r, c]).to(torch.float8_e4m3fn)
    return codes_RC, scale if block else scale.reshape(())


def by_hand(codes_RC: Tensor, scale: Tensor, block: tuple[int, int] | None) -> Tensor:
    if block is None:
        return codes_RC.float() * scale
    row_R, column_C = (torch.arange(size) // length for size, length in zip(codes_RC.shape, block, strict=True))
    return codes_RC.float() * scale[row_R][:, column_C]


def write(folder: Path, *, block: tuple[int, int] | None, fused: bool = False, **overrides: Any) -> dict[str, Tensor]:
    """Writes a tiny checkpoint in FP8; what its weights are in 16 bit."""
    model = tiny_model("deepseek_v3", dtype=torch.bfloat16, **overrides)
    model.save_pretrained(folder, save_original_format=not fused)
    tensors, expected = load_file(folder / "model.safetensors"), {}
    for name, weight in list(tensors.items()):
        expected[name] = weight
        if weight.ndim == 1 or "embed" in name or "lm_head" in name or name.endswith("gate.weight"):
            continue
        matrices = [quantised(matrix, block) for matrix in (weight if weight.ndim == 3 else [weight])]
        codes, scales = zip(*matrices, strict=True)
        wide = [by_hand(*matrix, block).bfloat16() for matrix in matrices]
        tensors[name] = torch.stack(codes) if weight.ndim == 3 else codes[0]
        tensors[f"{name}_scale_inv"] = torch.stack(scales) if weight.ndim == 3 else scales[0]
        expected[name] = torch.stack(wide) if weight.ndim == 3 else wide[0]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": block}
    edit_config(folder, quantization_config=settings)
    return expected


def edit_config(folder: Path, **fields: Any) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | fields))


def edit_settings(folder: Path, **fields: Any) -> None:
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_config(folder, quantization_config=settings | fields)


@pytest.fixture
def folder(tmp_path) -> Path:
    write(tmp_path / "fp8", block=BLOCK)
    return tmp_path / "fp8"


def test_a_factor_is_of_its_block() -> None:
    """Blocks of 2 x 3 over 3 x 4 codes: the last row and the last column are blocks of their own."""
    codes = torch.tensor([[1.0, 2, 4, 8], [1, 2, 4, 8], [0.5, 1, 2, -4]]).to(torch.float8_e4m3fn)
    scale = torch.tensor([[2.0, 10], [3, 100]])
    expected = torch.tensor([[2.0, 4, 8, 80], [2, 4, 8, 80], [1.5, 3, 6, -400]])
    into = torch.empty(3, 4)
    dequantise(codes, scale=scale, block=(2, 3), first=0, into=into)
    assert torch.equal(into, expected)
    dequantise(codes[1:], scale=scale, block=(2, 3), first=1, into=into[1:])
    assert torch.equal(into, expected)
    dequantise(codes, scale=torch.tensor(2.0), block=None, first=0, into=into)
    assert torch.equal(into, 2 * codes.float())


@pytest.mark.parametrize("fused", [False, True], ids=["by_expert", "fused"])
@pytest.mark.parametrize("block", [BLOCK, (128, 128), None], ids=["blocks", "one_block", "per_tensor"])
def test_weights_are_those_of_the_hand_calculation(block, fused, tmp_path) -> None:
    expected = write(tmp_path / "fp8", block=block, fused=fused)
    tiny_model("deepseek_v3", dtype=torch.bfloat16).save_pretrained(tmp_path / "wide", save_original_format=not fused)
    save_file(expected, tmp_path / "wide" / "model.safetensors", metadata={"format": "pt"})
    wide, whole = load_model(str(tmp_path / "wide")), load_model(str(tmp_path / "fp8"))
    assert_equal(whole, wide)
    convert_experts(wide)
    walk_and_compare(open_folder(str(tmp_path / "fp8")), wide)


def test_the_result_is_a_model_in_16_bit(folder, tmp_path) -> None:
    assert can_stream(str(folder))
    packed = quantize_folder(str(folder))
    for model in (load_model(str(folder)), open_folder(str(folder)).model, packed):
        assert "quantization_config" not in model.config.to_dict()
        assert model.dtype == torch.bfloat16
    model = load_model(str(folder))
    model.save_pretrained(tmp_path / "wide")
    with torch.no_grad():
        assert torch.equal(load_model(str(tmp_path / "wide"))(random_tokens()).logits, model(random_tokens()).logits)


def test_fp32_is_not_rounded_on_the_way(folder) -> None:
    stored = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.o_proj.weight"
    exact = by_hand(stored[name], stored[f"{name}_scale_inv"], BLOCK)
    assert not torch.equal(exact, exact.bfloat16().float())
    assert torch.equal(load_model(str(folder), dtype="float32").state_dict()[name], exact)
    streamed = open_folder(str(folder), dtype="float32")
    streamed.load_decoder("model.layers.1")
    assert torch.equal(streamed.model.state_dict()[name], exact)


NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda tensors: tensors.pop(f"{NAME}_scale_inv"), f"'{NAME}' in '.*' is in 8 bit, but no file holds its"),
        (
            lambda tensors: tensors.update({f"{NAME}_scale_inv": torch.ones(3, 2)}),
            rf"'{NAME}_scale_inv' in '.*model.safetensors' has shape \(3, 2\), but .*\(48, 64\) needs \(3, 3\)",
        ),
        (
            lambda tensors: tensors.update({f"{NAME}_scale_inv": torch.ones(3, 3, dtype=torch.uint8)}),
            "is stored as U8; factors must be in 32- or 16-bit floating point",
        ),
        (
            lambda tensors: tensors.update({NAME: tensors[NAME].to(torch.float8_e5m2)}),
            "is stored as F8_E5M2; of 8-bit floating point only F8_E4M3 can be read",
        ),
        (
            lambda tensors: (
                tensors.update({"model.norm.weight": torch.ones(64).to(torch.float8_e4m3fn)})
                or tensors.update({"model.norm.weight_scale_inv": torch.ones(1)})
            ),
            r"'model.norm.weight' in '.*' is in 8 bit and has shape \(64,\): no matrix",
        ),
    ],
    ids=["no_factors", "other_shape", "ue8m0", "e5m2", "vector"],
)
def test_damaged_or_other_factors_are_refused(change, match, folder) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for load in (load_model, open_folder):
        with pytest.raises(ValueError, match=match):
            load(str(folder))


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("fmt", "e5m2", r"`quantization_config.fmt` of config.json is 'e5m2'; .* only 'e4m3' can be read"),
        ("expert_dtype", "fp4", "`quantization_config.expert_dtype` of config.json is 'fp4'"),
        ("weight_block_size", [128], r"must be null or two positive integers, got \[128\]"),
        ("weight_block_size", [128, 0], r"must be null or two positive integers, got \[128, 0\]"),
    ],
)
def test_other_schemes_are_refused_by_name(field, value, match, folder) -> None:
    edit_settings(folder, **{field: value})
    for load in (load_model, open_folder):
        with pytest.raises(ValueError, match=match):
            load(str(folder))


def test_codes_without_their_config_are_refused(folder) -> None:
    content = json.loads((folder / "config.json").read_text())
    del content["quantization_config"]
    (folder / "config.json").write_text(json.dumps(content))
    for load in (load_model, open_folder):
        with pytest.raises(ValueError, match=r"is stored as F8_E4M3, but .* lacks the `quantization_config`"):
            load(str(folder))


def test_nan_codes_are_damage(folder) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[NAME].view(torch.uint8)[3, 4] = 0x7F
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"holds NaN or infinity in '{NAME}'"):
        open_folder(str(folder)).load_decoder("model.layers.0")
