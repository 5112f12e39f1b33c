"""`product` is `left @ right` whatever kernel it takes."""

# m rows of the left, k inner size, n columns of the right

import pytest
import torch
from torch import Tensor

from lightning_moe.models import products
from lightning_moe.models.products import product, product_pays

ROWS = [0, 1, 4, 5, 7, 8, 15, 16, 17, 255, 256, 257, 300]
# k * n is large enough for every fast kernel from 8 rows on (and from 1 row for sums of rows).
INNER, COLUMNS = 512, 528


def operand(num_rows: int, num_columns: int, *, layout: str = "rows", dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers, stored by rows, by columns, or with gaps."""
    generator = torch.Generator().manual_seed(num_rows)
    if layout == "columns":
        return torch.randn(num_columns, num_rows, generator=generator).to(dtype).T
    if layout == "gaps":
        return torch.randn(num_rows, 2 * num_columns, generator=generator).to(dtype)[:, ::2]
    return torch.randn(num_rows, num_columns, generator=generator).to(dtype)


def assert_equals_the_reference(output_mn: Tensor, left_mk: Tensor, right_kn: Tensor) -> None:
    """Against float64: sums of 512 products of about 1 in fp32, rounded once more in bf16."""
    expected = left_mk.double() @ right_kn.double()
    assert output_mn.dtype == left_mk.dtype
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2**-8}[left_mk.dtype]
    torch.testing.assert_close(output_mn.double(), expected, rtol=rounding, atol=2e-4)


@pytest.mark.parametrize("right", ["rows", "columns", "gaps"])
@pytest.mark.parametrize(
    ("left", "num_rows"), [*(("rows", count) for count in ROWS), ("columns", 16), ("columns", 257), ("gaps", 257)]
)
def test_float32_equals_the_float64_product(left, right, num_rows) -> None:
    left_mk, right_kn = operand(num_rows, INNER, layout=left), operand(INNER, COLUMNS, layout=right)
    assert_equals_the_reference(product(left_mk, right_kn), left_mk, right_kn)


@pytest.mark.parametrize("num_rows", [0, 1, 2, 4, 5, 17])
@pytest.mark.parametrize("right", ["rows", "columns", "gaps"])
@pytest.mark.parametrize("left", ["rows", "gaps"])
def test_bfloat16_equals_the_float64_product(left, right, num_rows) -> None:
    left_mk = operand(num_rows, INNER, layout=left, dtype=torch.bfloat16)
    right_kn = operand(INNER, COLUMNS, layout=right, dtype=torch.bfloat16)
    assert_equals_the_reference(product(left_mk, right_kn), left_mk, right_kn)


@pytest.mark.parametrize(("num_rows", "inner", "columns"), [(3, 0, 5), (300, 0, 5), (300, 4, 0), (0, 0, 0), (2, 3, 4)])
def test_small_and_empty_products(num_rows, inner, columns) -> None:
    left_mk, right_kn = operand(num_rows, inner), operand(inner, columns)
    assert_equals_the_reference(product(left_mk, right_kn), left_mk, right_kn)


@pytest.mark.parametrize(("dtype", "num_rows"), [(torch.float32, 16), (torch.bfloat16, 2)], ids=str)
@pytest.mark.parametrize("wanted", ["left", "right", "both"])
def test_gradients_are_those_of_matmul(wanted, dtype, num_rows) -> None:
    left_mk = operand(num_rows, INNER, dtype=dtype).requires_grad_(wanted != "right")
    right_kn = operand(INNER, COLUMNS, dtype=dtype).requires_grad_(wanted != "left")
    inputs = [tensor for tensor in (left_mk, right_kn) if tensor.requires_grad]
    ours = torch.autograd.grad(product(left_mk, right_kn).sum(), inputs)
    expected = torch.autograd.grad((left_mk @ right_kn).sum(), inputs)
    assert all(torch.equal(mine, reference) for mine, reference in zip(ours, expected, strict=True))


def test_a_parameter_without_autograd_takes_the_fast_kernels() -> None:
    left_mk, right_kn = operand(16, INNER), torch.nn.Parameter(operand(INNER, COLUMNS))
    with torch.no_grad():
        assert_equals_the_reference(product(left_mk, right_kn), left_mk, right_kn)
    with torch.inference_mode():
        assert_equals_the_reference(product(left_mk, right_kn), left_mk, right_kn)


def test_autocast_computes_in_its_type() -> None:
    left_mk, right_kn = operand(16, INNER), operand(INNER, COLUMNS)
    with torch.autocast("cpu", torch.bfloat16):
        output_mn = product(left_mk, right_kn)
    assert output_mn.dtype == torch.bfloat16
    torch.testing.assert_close(output_mn.float(), left_mk @ right_kn, rtol=0.02, atol=0.5)


def test_where_onednn_pays(monkeypatch) -> None:
    monkeypatch.setattr(products, "_HAS_ONEDNN", True)
    left_mk, right_kn = operand(16, INNER), operand(INNER, COLUMNS)
    assert product_pays(left_mk, right_kn)
    assert not product_pays(left_mk[:7], right_kn)  # few rows
    assert not product_pays(left_mk[:, :64], right_kn[:64])  # little work
    assert not product_pays(left_mk.double(), right_kn.double())
    assert not product_pays(left_mk.requires_grad_(), right_kn)


def test_groups_share_the_rows(monkeypatch) -> None:
    monkeypatch.setattr(products, "_HAS_ONEDNN", True)
    left_Sk, right_Gkn = operand(32, INNER), operand(INNER, COLUMNS).expand(4, INNER, COLUMNS)
    assert product_pays(left_Sk, right_Gkn, num_groups=4)  # 8 rows each
    assert not product_pays(left_Sk[:28], right_Gkn, num_groups=4)


def test_turning_onednn_off_gives_the_plain_product(monkeypatch) -> None:
    left_mk, right_kn = operand(16, INNER), operand(INNER, COLUMNS)
    monkeypatch.setattr(products, "_HAS_ONEDNN", False)
    assert torch.equal(product(left_mk, right_kn), left_mk @ right_kn)


def test_a_sum_of_rows_is_taken_for_few_vectors_only(monkeypatch) -> None:
    monkeypatch.setattr(products, "_IS_X86", True)
    taken: list[int] = []
    sum_of_rows = products._sum_of_rows
    monkeypatch.setattr(
        products, "_sum_of_rows", lambda left, right: taken.append(len(left)) or sum_of_rows(left, right)
    )
    for dtype in (torch.float32, torch.bfloat16):
        for num_rows in (0, 1, 4, 5):
            left_mk, right_kn = operand(num_rows, INNER, dtype=dtype), operand(INNER, COLUMNS, dtype=dtype)
            assert_equals_the_reference(product(left_mk, right_kn), left_mk, right_kn)
    product(left_mk[:1], right_kn[:, :256])  # not contiguous
    product(left_mk[:1, :64], right_kn[:64])  # small
    assert taken == [1, 4]
