"""Our NF4 codes are bitsandbytes' codes."""

import pytest
import torch
from bitsandbytes.functional import get_4bit_type, quantize_4bit

from lightning_moe.quantization import rounding
from lightning_moe.quantization.rounding import quantize_rows


def assert_like_bitsandbytes(weight_CH: torch.Tensor) -> None:
    packed, state = quantize_4bit(weight_CH.float().contiguous(), blocksize=64, quant_type="nf4")
    codes, absmax_CB = quantize_rows(weight_CH)
    assert codes.dtype == torch.uint8
    assert absmax_CB.dtype == torch.float32
    assert torch.equal(codes.flatten(), packed.flatten())
    assert torch.equal(absmax_CB.flatten(), state.absmax.flatten())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_rows", "hidden_size"), [(1, 64), (7, 128), (300, 192), (40, 2048)])
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e30])
def test_random_rows(dtype, num_rows, hidden_size, scale, monkeypatch) -> None:
    monkeypatch.setattr(rounding, "_VALUES_AT_A_TIME", 9 * 192)  # several blocks of rows, the last one not full
    weight_CH = torch.randn(num_rows, hidden_size, generator=torch.Generator().manual_seed(0)) * scale
    assert_like_bitsandbytes(weight_CH.clamp(-6e4, 6e4).to(dtype) if dtype == torch.float16 else weight_CH.to(dtype))


def test_values_on_and_beside_the_midpoints_go_the_same_way() -> None:
    code = get_4bit_type("nf4", device="cpu")
    middle = (code[:-1] + code[1:]) / 2
    beside = [torch.nextafter(middle, torch.full_like(middle, end)) for end in (-1.0, 1.0)]
    weight_CH = torch.zeros(1, 64)
    weight_CH[0, :62] = torch.cat([middle, *beside, code, torch.tensor([1.0])])[:62]
    weight_CH[0, 62] = 1.0
    for scale in (1.0, 0.37, 3e-5):
        assert_like_bitsandbytes(weight_CH * scale)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_has_no_code_is_refused(value) -> None:
    weight_CH = torch.zeros(3, 128, dtype=torch.float16)
    weight_CH[1, 70] = value
    with pytest.raises(ValueError, match=r"A weight of type torch.float16 that goes to 4 bit holds NaN or infinity"):
        quantize_rows(weight_CH)


def test_zeros_subnormals_and_views() -> None:
    weight_CH = torch.zeros(3, 128)
    weight_CH[1, 3], weight_CH[2, 5] = 1e-40, -0.0
    assert_like_bitsandbytes(weight_CH)
    assert_like_bitsandbytes(torch.randn(128, 6).T)
    assert_like_bitsandbytes(torch.randn(6, 256)[:, 64:192])
    codes, absmax_CB = quantize_rows(torch.empty(0, 128))
    assert codes.shape == (0, 64)
    assert absmax_CB.shape == (0, 2)
