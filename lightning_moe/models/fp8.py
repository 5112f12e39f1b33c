"""Checkpoints in 8-bit floating point, dequantised while they are read.  R rows, C columns of a matrix, E experts.

The form that DeepSeek-V3 and Qwen3's FP8 releases share (transformers calls it fine-grained FP8): a weight in
float8_e4m3fn and beside it `<weight>_scale_inv`, one factor for each block of `weight_block_size`, the last block of a
row or column possibly smaller, or one for the whole tensor: w[r, c] = q[r, c] * scale_inv[r // block, c // block].
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from lightning_moe.models.stored_tensors import LazyTensor

QUANT_METHOD = "fp8"

_SUFFIX = "_scale_inv"


@dataclass(frozen=True, kw_only=True, eq=False)
class Fp8Tensor(LazyTensor):
    """A weight in float8_e4m3fn as the weight in 16 bit (or 32) that it stands for.

    Args:
        weight: `[R, C]` or `[E, R, C]`.
        scale: its factors: `[r, c]` or `[E, r, c]` for r x c blocks, or one factor (for each expert).
        block: rows and columns of a block; None for one factor.
        type_name: type of the result as safetensors names it.
    """

    weight: LazyTensor
    scale: LazyTensor
    block: tuple[int, int] | None
    type_name: str

    @property
    def file(self) -> Path:  # pyright: ignore[reportIncompatibleVariableOverride]
        """File of the weight."""
        return self.weight.file

    @property
    def key(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Name of the weight."""
        return self.weight.key

    @property
    def shape(self) -> tuple[int, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Shape of the weight."""
        return self.weight.shape

    def read_rows(self, first: int, last: int, *, into: Tensor) -> None:
        """Reads codes and factors, multiplies in fp32 and rounds once to the type of `into`, of the rows' shape."""
        codes = torch.empty(into.shape, dtype=self.weight.dtype)
        self.weight.read_rows(first, last, into=codes)
        scale = torch.empty(self.scale.shape, dtype=self.scale.dtype)
        self.scale.read_rows(0, self.scale.num_rows, into=scale)
        if len(self.shape) == 2:
            dequantise(codes, scale=scale, block=self.block, first=first, into=into)
            return
        for expert in range(first, last):
            own = scale.reshape(-1)[0] if scale.numel() == 1 else scale[expert]
            dequantise(codes[expert - first], scale=own, block=self.block, first=0, into=into[expert - first])


def dequantise(codes_RC: Tensor, *, scale: Tensor, block: tuple[int, int] | None, first: int, into: Tensor) -> None:
    """Fills `into [R, C]` with codes times the factor of their block; `first` is the row of the first code."""
    if block is None:
        into.copy_(codes_RC.float() * scale.float())
        return
    block_rows, block_columns = block
    num_rows, num_columns = codes_RC.shape
    start = 0
    while start < num_rows:
        index = (first + start) // block_rows
        stop = min(num_rows, (index + 1) * block_rows - first)
        scale_C = scale[index].float().repeat_interleave(min(block_columns, num_columns))[:num_columns]
        into[start:stop] = codes_RC[start:stop].float() * scale_C
        start = stop


def quantization_of(config: PretrainedConfig) -> Mapping[str, Any]:
    """What `config.json` says of the quantisation; empty where the weights are stored as they are."""
    return config.to_dict().get("quantization_config") or {}


def is_fp8(config: PretrainedConfig) -> bool:
    """Whether the weights are stored in the form of this file (or in one that calls itself so)."""
    return quantization_of(config).get("quant_method") == QUANT_METHOD


def without_quantization(config: PretrainedConfig) -> PretrainedConfig:
    """The same config, in place, of the model that dequantising gives."""
    del config.quantization_config  # pyright: ignore[reportAttributeAccessIssue]: there is one
    return config


def dequantised(
    tensors: Mapping[str, LazyTensor], *, config: PretrainedConfig, type_name: str = "BF16"
) -> dict[str, LazyTensor]:
    """The tensors of the checkpoint that this one was quantised from; nothing is read.

    Args:
        tensors: what the files hold.
        config: the config with its `quantization_config`.
        type_name: type of the weights that were in 8 bit.

    Raises:
        ValueError: another scheme of 8 bit, a factor is missing, or there are too few or too many of them.
    """
    block = _block_of(quantization_of(config))
    result = {key: tensor for key, tensor in tensors.items() if not key.endswith(_SUFFIX)}
    for key, tensor in result.items():
        if tensor.dtype.is_floating_point and tensor.dtype.itemsize == 1:
            scale = tensors.get(f"{key}{_SUFFIX}")
            result[key] = _checked(tensor, scale=scale, block=block, type_name=type_name)
    return result


def _block_of(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    odd = {"fmt": ("e4m3",), "expert_dtype": ("fp8",)}
    for field, allowed in odd.items():
        if settings.get(field, allowed[0]) not in allowed:
            raise ValueError(
                f"`quantization_config.{field}` of config.json is {settings[field]!r}; of 8-bit floating point only "
                f"{', '.join(map(repr, allowed))} can be read. Convert the model to bfloat16 first."
            )
    block = settings.get("weight_block_size")
    if block is None:
        return None
    if not isinstance(block, list | tuple) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        raise ValueError(
            f"`quantization_config.weight_block_size` of config.json must be null or two positive integers, "
            f"got {block!r}."
        )
    return block[0], block[1]


def _checked(
    weight: LazyTensor, *, scale: LazyTensor | None, block: tuple[int, int] | None, type_name: str
) -> Fp8Tensor:
    if weight.dtype != torch.float8_e4m3fn:
        raise ValueError(
            f"'{weight.key}' in '{weight.file}' is stored as {weight.type_name}; of 8-bit floating point only F8_E4M3 "
            "can be read. Convert the model to bfloat16 first."
        )
    if scale is None:
        raise ValueError(
            f"'{weight.key}' in '{weight.file}' is in 8 bit, but no file holds its factors '{weight.key}{_SUFFIX}': "
            "another scheme than that of DeepSeek-V3, or a damaged checkpoint. Convert the model to bfloat16 first."
        )
    if not scale.dtype.is_floating_point or scale.dtype.itemsize < 2:
        raise ValueError(
            f"'{scale.key}' in '{scale.file}' is stored as {scale.type_name}; factors must be in 32- or 16-bit "
            "floating point. Convert the model to bfloat16 first."
        )
    if len(weight.shape) not in (2, 3):
        raise ValueError(f"'{weight.key}' in '{weight.file}' is in 8 bit and has shape {weight.shape}: no matrix.")
    single = math.prod(scale.shape) == 1 or (len(weight.shape) == 3 and math.prod(scale.shape) == weight.shape[0])
    if block is not None and not single:
        blocks = tuple(-(-size // length) for size, length in zip(weight.shape[-2:], block, strict=True))
        expected = (*weight.shape[:-2], *blocks)
    else:
        expected, block = scale.shape if single else (), None
    if scale.shape != expected:
        raise ValueError(
            f"'{scale.key}' in '{scale.file}' has shape {scale.shape}, but '{weight.key}' of shape {weight.shape} "
            f"needs {expected}."
        )
    return Fp8Tensor(weight=weight, scale=scale, block=block, type_name=type_name)
