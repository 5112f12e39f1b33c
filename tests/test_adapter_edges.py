"""Corners of DoRA: rows that cancel, magnitudes below zero.  r rank, i inputs, o outputs, G experts."""

import torch

from lightning_moe.adapters.functional import adapted_norm, adapted_weight


def test_the_norm_of_rows_that_cancel_is_a_number():
    # W = -s B A: the norm is 0, and its square a difference of large sums, which rounding brings below zero.
    generator = torch.Generator().manual_seed(0)
    A_Gri, B_Gor = (torch.randn(size, generator=generator) for size in ((2, 4, 64), (2, 96, 4)))
    weight_Goi = -0.5 * (B_Gor @ A_Gri)
    base_sq_Go, product_Gro = weight_Goi.square().sum(2), A_Gri @ weight_Goi.mT
    norm_Go = adapted_norm(product_Gro, A_Gri, B_Gor, base_sq_Go, 0.5)
    assert bool((norm_Go == 0).any())  # what was below zero
    assert float(norm_Go.max()) < 1e-2 * float(base_sq_Go.sqrt().min())


def test_a_negative_magnitude_turns_its_row_around():
    weight_oi = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    A_ri, B_or = torch.ones(1, 2), torch.zeros(2, 1)
    turned_oi = adapted_weight(weight_oi, A_ri, B_or, torch.tensor([-5.0, 1.0]), 2.0)
    assert torch.allclose(turned_oi, torch.tensor([[-3.0, -4.0], [0.0, 1.0]]))
