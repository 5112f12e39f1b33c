"""Repairs of random experts against a direct least-squares fit, and new rows of random cuts where they belong.

E experts, C channels of a layer, n channels of one expert (k kept, d dropped), H hidden, T tokens.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from property_models import assert_same_tensors, logits_of, model_cases
from property_strategies import cases, generator_of, seeds
from reference_moe import mask_stock_model
from torch import Tensor

from lightning_moe.models.discovery import moe_layers
from lightning_moe.surgery.cut import apply_plan
from lightning_moe.surgery.least_squares import RIDGES, SCARCE_RIDGE, repaired_down_rows
from lightning_moe.surgery.repair import Repair

pytestmark = pytest.mark.property


def fitted(kept_Tk: Tensor, lost_Td: Tensor, *, rows: tuple[Tensor, Tensor], ridge: float) -> Tensor:
    """`argmin || F W' - (F W + D V) ||^2 + lambda m || W' - W ||^2`, the pull as further equations."""
    kept_kH, lost_dH = rows
    pull_kk = (ridge * kept_Tk.square().sum(0).mean()).sqrt() * torch.eye(len(kept_kH), dtype=torch.float64)
    left = torch.cat([kept_Tk, pull_kk])
    return torch.linalg.lstsq(left, torch.cat([kept_Tk @ kept_kH + lost_Td @ lost_dH, pull_kk @ kept_kH])).solution


@given(
    width=st.integers(1, 12),
    num_tokens=st.sampled_from((0, 1, 2, 8, 60, 400)),
    alike=st.booleans(),
    share=st.sampled_from((0.0, 0.3, 0.7, 1.0)),
    seed=seeds,
)
@cases(150)
def test_repaired_rows_are_those_of_the_best_ridge_that_pays(width, num_tokens, alike, share, seed):
    """Also of experts without tokens, of one channel, of channels that are all multiples of one or two."""
    generator = generator_of(seed)
    mixed_rn = torch.randn(2 if alike else width, width, generator=generator, dtype=torch.float64)
    hidden_Tn = torch.randn(num_tokens, len(mixed_rn), generator=generator, dtype=torch.float64) @ mixed_rn
    hidden_Tn += 0.1 * torch.randn(num_tokens, width, generator=generator, dtype=torch.float64)
    down_nH = torch.randn(width, 3, generator=generator, dtype=torch.float64)
    keep_n = torch.rand(width, generator=generator) < share
    halves = [hidden_Tn[0::2], hidden_Tn[1::2]]
    half_a, half_b = (half.T @ half for half in halves)
    repair = repaired_down_rows(down_nH=down_nH, keep_n=keep_n, half_a=half_a, half_b=half_b, num_tokens=num_tokens)
    rows = down_nH[keep_n], down_nH[~keep_n]
    if keep_n.all() or not keep_n.any():
        assert torch.equal(repair.down_rows, rows[0])
        return

    def errors(ridge: float) -> Tensor:
        """Of each half with the rows of the other."""
        found = []
        for mine, other in (halves, reversed(halves)):
            new_kH = fitted(other[:, keep_n], other[:, ~keep_n], rows=rows, ridge=ridge)
            found.append((mine[:, keep_n] @ (new_kH - rows[0]) - mine[:, ~keep_n] @ rows[1]).square().sum())
        return torch.stack(found)

    before_2 = torch.stack([(half[:, ~keep_n] @ rows[1]).square().sum() for half in halves])
    torch.testing.assert_close(repair.error_before, float(before_2.sum()))
    if repair.ridge is None:
        assert torch.equal(repair.down_rows, rows[0])
        assert repair.error_after == repair.error_before
    else:
        expected_kH = fitted(hidden_Tn[:, keep_n], hidden_Tn[:, ~keep_n], rows=rows, ridge=repair.ridge)
        torch.testing.assert_close(repair.down_rows, expected_kH, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(repair.error_after, float(errors(repair.ridge).sum()), rtol=1e-5, atol=1e-8)
    if num_tokens > 1:
        limit_2 = before_2 * (1 - min(1.0, (2 / num_tokens) ** 0.5))
        allowed = [ridge for ridge in RIDGES if num_tokens >= width or ridge >= SCARCE_RIDGE]
        paying = {ridge: float(errors(ridge).sum()) for ridge in allowed if bool((errors(ridge) < limit_2).all())}
        assert (repair.ridge is None) == (not paying)
        assert not paying or repair.error_after <= min(paying.values()) * (1 + 1e-5) + 1e-8
    else:
        assert repair.ridge is None


@given(case=model_cases(), seed=seeds)
@cases(15)
def test_new_rows_of_a_cut_stand_where_the_old_ones_did(case, seed):
    model, reference, plan = case.model(), case.model(), case.plan(seed=seed)
    rows = [torch.randn(int(keep_C.sum()), 64, generator=generator_of(seed)) for keep_C in plan.keep]
    for layer, rows_CH in zip(moe_layers(reference), rows, strict=True):
        down_EHn = layer.experts.get_parameter("down_proj").data
        channel_CH = down_EHn.transpose(1, 2).flatten(0, 1).clone()
        channel_CH[plan.keep[layer.index]] = rows_CH
        down_EHn.copy_(channel_CH.view(len(down_EHn), -1, 64).transpose(1, 2))
    none = (0.0,) * len(rows)
    repair = Repair(
        plan_digest=plan.digest,
        down_rows=tuple(rows),
        error_before=none,
        error_after=none,
        num_repaired=(0,) * len(rows),
    )
    apply_plan(model, plan=plan, repair=repair)
    expected = mask_stock_model(reference, rule=case.rule, plan=plan)
    torch.testing.assert_close(logits_of(model), logits_of(expected), rtol=1e-4, atol=1e-5)
    plain = case.model()
    apply_plan(plain, plan=plan)
    for layer, other in zip(moe_layers(plain), moe_layers(model), strict=True):
        other.experts.down_proj.weight.data.copy_(layer.experts.down_proj.weight.data)
    assert_same_tensors(model, plain)
