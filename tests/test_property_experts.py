"""ChannelExperts on random widths and routings: forward and gradients against a loop written from the definition.

T tokens, K experts per token, E experts, n channels, H hidden.
"""

from dataclasses import dataclass
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from property_strategies import cases, generator_of, seeds
from random_experts import gradients, naive, random_experts
from torch import Tensor

from lightning_moe.models.channel_experts import PROJECTIONS, ChannelExperts
from lightning_moe.models.grouped import grouped_matmul, grouped_outer
from lightning_moe.quantization.nf4 import pack_experts, unpack_experts

pytestmark = pytest.mark.property

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}


@dataclass(frozen=True, kw_only=True)
class Routed:
    """Experts of some widths, and tokens that a router has sent to some of them."""

    widths: tuple[int, ...]
    hidden: int
    dtype: torch.dtype
    index_TK: Tensor
    seed: int
    novices: tuple[int, ...] = ()

    def experts(self, *, dtype: torch.dtype | None = None) -> ChannelExperts:
        experts = random_experts(self.widths, dtype=dtype or self.dtype, seed=self.seed, hidden=self.hidden)
        if self.novices:
            rows_NH = torch.randn(len(self.novices), self.hidden, generator=generator_of(self.seed))
            experts.set_novices(self.novices, rows_NH.to(dtype or self.dtype))
        return experts

    @property
    def inputs(self) -> tuple[Tensor, Tensor]:
        generator = generator_of(self.seed)
        hidden_TH = torch.randn(len(self.index_TK), self.hidden, generator=generator, dtype=torch.float64)
        weights_TK = torch.rand(self.index_TK.shape, generator=generator, dtype=torch.float64)
        return hidden_TH.to(self.dtype), weights_TK.to(self.dtype)


@st.composite
def routed(
    draw: st.DrawFn,
    *,
    dtypes: tuple[torch.dtype, ...] = (torch.float64,),
    hiddens: tuple[int, ...] = (1, 3, 8, 16, 33, 64),
    all_widths: tuple[int, ...] = (0, 1, 3, 4, 8, 8, 9, 16),
    novices: bool = False,
) -> Routed:
    """K = 1 to E, T from 0; routings that hit all experts, few or one; an expert may come twice."""
    num_experts = draw(st.integers(1, 7))
    top_k = draw(st.integers(1, num_experts))
    widths = draw(st.lists(st.sampled_from(all_widths), min_size=num_experts, max_size=num_experts))
    num_tokens = draw(st.sampled_from((0, 1, 2, 5, 17)))
    seed, repeats = draw(seeds), draw(st.booleans())
    favoured = draw(st.integers(top_k, num_experts))
    if repeats:
        index_TK = torch.randint(favoured, (num_tokens, top_k), generator=generator_of(seed))
    else:
        index_TK = torch.rand(num_tokens, favoured, generator=generator_of(seed)).topk(top_k, dim=-1).indices
    order_E = torch.randperm(num_experts, generator=generator_of(seed))
    gone = [expert for expert, width in enumerate(widths) if width == 0]
    return Routed(
        widths=tuple(widths),
        hidden=draw(st.sampled_from(hiddens)),
        dtype=draw(st.sampled_from(dtypes)),
        index_TK=order_E[index_TK],
        seed=seed,
        novices=tuple(gone) if novices else (),
    )


def naive_with_novices(experts: ChannelExperts, hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
    if not len(hidden_TH):
        return hidden_TH * weights_TK.sum()
    output_TH = naive(experts, hidden_TH, index_TK, weights_TK)
    for position, expert in enumerate(experts.novice_experts):
        gate_T = torch.where(index_TK == expert, weights_TK, 0).sum(1)
        output_TH = output_TH + gate_T[:, None] * experts.novices[position].detach()
    return output_TH


def assert_close(mine: list[Tensor], expected: list[Tensor], *, tolerance: float) -> None:
    for value, reference in zip(mine, expected, strict=True):
        scale = max(float(reference.abs().max()) if reference.numel() else 0.0, 1.0)
        torch.testing.assert_close(value, reference.to(value.dtype), rtol=tolerance, atol=tolerance * scale)


@given(case=routed(dtypes=tuple(TOLERANCE)))
@cases(150)
def test_forward_and_gradients_equal_the_naive_loop(case):
    experts, exact = case.experts(), case.experts(dtype=case.dtype).double()
    hidden_TH, weights_TK = case.inputs
    mine = gradients(lambda x, w: experts(x, case.index_TK, w), hidden_TH, weights_TK, list(experts.parameters()))
    expected = gradients(
        lambda x, w: naive_with_novices(exact, x, case.index_TK, w),
        hidden_TH.double(),
        weights_TK.double(),
        list(exact.parameters()),
    )
    assert {value.dtype for value in mine} == {case.dtype}
    assert_close(mine, expected, tolerance=TOLERANCE[case.dtype])
    with torch.no_grad():  # another path: run by run, added up as it goes
        assert_close([experts(hidden_TH, case.index_TK, weights_TK)], expected[:1], tolerance=TOLERANCE[case.dtype])


TWICE = torch.tensor([[1, 2, 1]])


@example(case=Routed(widths=(0,) * 3, hidden=1, dtype=torch.float64, index_TK=TWICE, seed=0, novices=(0, 1, 2)))
@given(case=routed(novices=True))
@cases(60)
def test_novices_are_constants_of_their_experts(case):
    experts = case.experts()
    hidden_TH, weights_TK = case.inputs
    rows = [parameter for parameter in experts.parameters() if parameter.requires_grad]
    mine = gradients(lambda x, w: experts(x, case.index_TK, w), hidden_TH, weights_TK, rows)
    expected = gradients(lambda x, w: naive_with_novices(experts, x, case.index_TK, w), hidden_TH, weights_TK, rows)
    assert_close(mine, expected, tolerance=1e-12)


@given(case=routed(), order_seed=seeds)
@cases(60)
def test_experts_in_another_order_give_the_same_output(case, order_seed):
    experts = case.experts()
    order_E = torch.randperm(len(case.widths), generator=generator_of(order_seed)).tolist()
    turned = ChannelExperts(
        widths=[case.widths[expert] for expert in order_E], hidden_size=case.hidden, act_fn=experts.act_fn
    ).double()
    for place, expert in enumerate(order_E):
        for name in PROJECTIONS:
            mine, theirs = (slice(*one.row_range(i)) for one, i in ((turned, place), (experts, expert)))
            turned.projection(name).weight.data[mine] = experts.projection(name).weight.data[theirs]
    place_E = torch.tensor(order_E).argsort()
    hidden_TH, weights_TK = case.inputs
    mine = gradients(lambda x, w: turned(x, place_E[case.index_TK], w), hidden_TH, weights_TK, [])
    expected = gradients(lambda x, w: experts(x, case.index_TK, w), hidden_TH, weights_TK, [])
    assert_close(mine, expected, tolerance=1e-12)


@given(case=routed(dtypes=(torch.float32,), hiddens=(64, 128)))
@cases(60)
def test_packed_experts_are_their_dequantised_ones(case):
    packed, dense = case.experts(), case.experts()
    pack_experts(packed)
    pack_experts(dense)
    unpack_experts(dense, dtype=torch.float64)
    hidden_TH, weights_TK = case.inputs
    mine = gradients(lambda x, w: packed(x, case.index_TK, w), hidden_TH, weights_TK, [])
    expected = gradients(
        lambda x, w: naive_with_novices(dense, x, case.index_TK, w), hidden_TH.double(), weights_TK.double(), []
    )
    assert_close(mine, expected, tolerance=1e-5)
    with torch.no_grad():
        assert_close([packed(hidden_TH, case.index_TK, weights_TK)], expected[:1], tolerance=1e-5)


@given(
    counts=st.lists(st.integers(0, 3), min_size=1, max_size=4),
    inner=st.sampled_from((1, 2, 4, 8, 12)),
    outer=st.sampled_from((1, 2, 4, 8, 12)),
    dtype=st.sampled_from((torch.float64, torch.float32)),
    flips=st.tuples(st.booleans(), st.booleans()),
    spare=st.sampled_from((0, 4)),
    seed=seeds,
)
@cases(150)
def test_grouped_products_of_any_views_are_loops(counts, inner, outer, dtype, flips, spare, seed):
    """Transposed operands, and columns cut out of wider ones: kernels want their strides just so."""
    generator, bounds = generator_of(seed), (0, *accumulate(counts))

    def view(*size: int, flipped: bool) -> Tensor:
        *front, rows, columns = size
        stored = (*front, columns, rows + spare) if flipped else (*front, rows, columns + spare)
        wide = torch.randn(stored, generator=generator, dtype=torch.float64).to(dtype)
        return wide.transpose(-1, -2)[..., :rows, :] if flipped else wide[..., :columns]

    input_Sk = view(bounds[-1], inner, flipped=flips[0])
    weight_Gkn = view(len(counts), inner, outer, flipped=flips[1])
    right_Sn = view(bounds[-1], outer, flipped=flips[1])
    products, outers = [], []
    for group, (start, stop) in enumerate(pairwise(bounds)):
        products.append(input_Sk[start:stop].double() @ weight_Gkn[group].double())
        outers.append(input_Sk[start:stop].double().T @ right_Sn[start:stop].double())
    mine = [grouped_matmul(input_Sk, weight_Gkn, bounds), grouped_outer(input_Sk, right_Sn, bounds)]
    assert_close(mine, [torch.cat(products), torch.stack(outers)], tolerance=TOLERANCE[dtype])
