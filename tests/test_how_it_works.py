"""What `lightning_moe/README.md` derives and no other test shows, and that the tests and names on it exist."""

import ast
import re
from pathlib import Path

import pytest
import torch
from statistics_factory import make_statistics
from torch import Tensor

from lightning_moe.adapters.functional import adapted_norm, adapted_weight, squared_norms
from lightning_moe.surgery.least_squares import refit_rows

pytestmark = pytest.mark.docs

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "lightning_moe" / "README.md").read_text(encoding="utf-8")
NAMES = (
    "ChannelExperts",
    "NormCache",
    "LayerWalk",
    "first_order_factor",
    "cover",
    "smooth",
    "align_widths",
    "usage_costs",
    "refit_rows",
    "adapted_norm",
    "cut_dora_experts",
)
NUM_PAIRS, NUM_KEPT, NUM_DROPPED, HIDDEN = 400, 5, 3, 6


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram(values_Sc: Tensor, *, weight_S: Tensor) -> Tensor:
    """`sum over pairs of g^2 q h h^T`."""
    return values_Sc.T @ (weight_S[:, None] * values_Sc)


def test_a_set_of_channels_costs_the_quadratic_form_of_its_gram():
    # g^2 q of each pair, its channels, and W_down transposed: leave three channels out and look at the output.
    weight_S, hidden_Sc, down_cH = random(NUM_PAIRS).square(), random(NUM_PAIRS, 8, seed=1), random(8, HIDDEN, seed=2)
    gone = [1, 4, 6]
    kept_Sc = hidden_Sc.index_fill(1, torch.tensor(gone), 0.0)
    error = (weight_S * ((hidden_Sc - kept_Sc) @ down_cH).square().sum(1)).sum()
    gram_cc, products_cc = gram(hidden_Sc, weight_S=weight_S), down_cH @ down_cH.T
    torch.testing.assert_close(error, (gram_cc * products_cc)[gone][:, gone].sum())
    alone = (gram_cc.diagonal() * products_cc.diagonal())[gone].sum()  # what a sum of channel ablations says
    assert not torch.isclose(error, alone, rtol=1e-3)


def test_the_repaired_rows_are_where_the_gradient_vanishes():
    # Dropped channels that the kept ones nearly give, so that a repair pays: D = F M + noise.
    weight_S, kept_Sk = random(NUM_PAIRS).square(), random(NUM_PAIRS, NUM_KEPT, seed=1)
    dropped_Sd = kept_Sk @ random(NUM_KEPT, NUM_DROPPED, seed=2) + 0.1 * random(NUM_PAIRS, NUM_DROPPED, seed=3)
    rows_kH, lost_dH = random(NUM_KEPT, HIDDEN, seed=4), random(NUM_DROPPED, HIDDEN, seed=5)
    values_Sc = torch.cat([kept_Sk, dropped_Sd], dim=1)
    halves = [gram(values_Sc[part], weight_S=weight_S[part]) for part in (slice(0, None, 2), slice(1, None, 2))]
    repair = refit_rows(
        kept_kH=rows_kH,
        lost_dH=lost_dH,
        half_a=halves[0],
        half_b=halves[1],
        num_tokens=NUM_PAIRS,
        num_channels=NUM_KEPT + NUM_DROPPED,
    )
    assert repair.ridge is not None

    def objective(new_kH: Tensor) -> Tensor:
        error_SH = kept_Sk @ new_kH - (kept_Sk @ rows_kH + dropped_Sd @ lost_dH)
        mean = gram(kept_Sk, weight_S=weight_S).diagonal().mean()
        pull = repair.ridge * mean * (new_kH - rows_kH).square().sum()
        return (weight_S * error_SH.square().sum(1)).sum() + pull

    at_new, at_old = repair.down_rows.clone().requires_grad_(), rows_kH.clone().requires_grad_()
    (slope_new,), (slope_old,) = (torch.autograd.grad(objective(rows), rows) for rows in (at_new, at_old))
    assert slope_old.norm() > 100
    assert slope_new.norm() < 1e-9 * slope_old.norm()


def test_a_rescaled_magnitude_leaves_the_scale_of_a_dora_output():
    # `down` loses inputs: W and A lose columns, the norm shrinks, and m' = m N' / N keeps c = m / N.
    scaling, rank, keep = 0.5, 2, [0, 2, 3, 6]
    weight_oi, A_ri, B_or, magnitude_o = (
        random(4, 8),
        random(rank, 8, seed=1),
        random(4, rank, seed=2),
        random(4, seed=3),
    )

    def norm(columns: list[int]) -> Tensor:
        product_ro = A_ri[:, columns] @ weight_oi[:, columns].T
        base_sq_o = squared_norms(weight_oi[:, columns].T[None])
        return adapted_norm(product_ro[None], A_ri[None, :, columns], B_or[None], base_sq_o, scaling)[0]

    new_o = magnitude_o * norm(keep) / norm(list(range(8)))
    cut_oi = adapted_weight(weight_oi[:, keep], A_ri[:, keep], B_or, new_o, scaling)
    whole_oi = adapted_weight(weight_oi, A_ri, B_or, magnitude_o, scaling)
    torch.testing.assert_close(cut_oi, whole_oi[:, keep])  # on the kept inputs, the masked model's weights


def test_the_tests_that_the_page_names_exist():
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", PAGE)
    assert len(named) >= 20
    for file, name in named:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{name}"


def test_the_names_that_the_page_uses_are_defined():
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "lightning_moe").rglob("*.py"))
    defined = set(re.findall(r"^ *(?:class|def) (\w+)\b", sources, re.MULTILINE))
    for name in NAMES:
        assert f"`{name}`" in PAGE, name
        assert name in defined, name


def test_the_statistics_of_the_table_are_those_that_are_taken():
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| (layer|expert|channel) \|", PAGE, re.MULTILINE)
    named = {name for cell, _ in rows for name in re.findall(r"\w+", cell)}
    assert len(named) == 14
    assert named <= set(make_statistics().total()[0])
