"""Corners of 4-bit rows: scales of blocks go to the nearest code."""

import torch

from lightning_moe.quantization.nf4 import PackedRows


def test_scales_of_blocks_are_rounded_to_the_nearest_code():
    # Largest values 1, 0.3019 and 0.0981 of a row: 255, 76.98 and 25.02 of 255.
    weight_1H = torch.tensor([[1.0] * 64 + [0.3019] * 64 + [0.0981] * 64])
    packed = PackedRows.pack(weight_1H)
    assert packed.absmax.tolist() == [[255, 77, 25]]
    assert packed.scale.tolist() == [1.0]
    values = packed.rows(0, 1, torch.float32)[0, ::64]
    assert torch.allclose(values, torch.tensor([1.0, 77 / 255, 25 / 255]), rtol=1e-6, atol=0)
