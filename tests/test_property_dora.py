"""DoRA and LoRA on random experts and routings, against loops written from the definition, before and after a cut.

T tokens, K experts per token, E experts, C channels of a layer, n channels of one expert, H hidden, r rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from dora_reference import SIDES, adapted
from hypothesis import given
from hypothesis import strategies as st
from property_strategies import cases, generator_of, seeds
from test_property_experts import Routed, assert_close, routed
from torch import Tensor
from torch.nn import functional

from lightning_moe.adapters import DoraExperts, cut_dora_experts
from lightning_moe.quantization.nf4 import pack_experts

pytestmark = pytest.mark.property


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """Routed experts under an adapter that is not the identity."""

    routed: Routed
    rank: int
    use_dora: bool
    packed: bool

    def layer(self) -> DoraExperts:
        experts = self.routed.experts().requires_grad_(False)
        if self.packed:
            pack_experts(experts)
        layer = adapted(experts, rank=self.rank, use_dora=self.use_dora, seed=self.routed.seed)
        return layer if self.packed else layer.double()

    @property
    def tolerance(self) -> float:
        return 2e-4 if self.packed else 1e-10


@st.composite
def adapted_cases(draw: st.DrawFn) -> Adapted:
    """In fp64, or packed in fp32; a rank above some widths.

    The closed form of a norm loses digits where an adapter cancels a row, as it may one of a few numbers: fp64 has them
    to spare.
    """
    packed = draw(st.booleans())
    if packed:
        one = draw(routed(dtypes=(torch.float32,), hiddens=(64, 128), all_widths=(0, 8, 8, 12, 16)))
    else:
        one = draw(routed(hiddens=(1, 8, 33)))
    return Adapted(
        routed=one,
        rank=draw(st.integers(1, 9)),
        use_dora=draw(st.booleans()),
        packed=packed,
    )


def leaves(layer: DoraExperts) -> dict[str, Tensor]:
    """The adapter's parameters in fp64, as leaves of their own."""
    parameters = layer.adapter_parameters("default")
    return {name: value.detach().double().requires_grad_() for name, value in parameters.items()}


def adapted_matrix(layer: DoraExperts, parameters: Mapping[str, Tensor], *, expert: int, side: str) -> Tensor:
    """`m / ||W + s B A|| (W + s B A)` of one projection, `[outputs, inputs]`, the norm a constant."""
    slot, rows = layer.experts.slot_order.index(expert), slice(*layer.experts.row_range(expert))
    matrices = dict(zip(SIDES, layer.experts.expert_matrices(expert, dtype=torch.float64), strict=True))
    A, B = parameters[f"lora_A_{side}"], parameters[f"lora_B_{side}"]
    if side == "down":
        weight_oi = matrices[side].T + layer.scaling["default"] * B[slot] @ A[rows].T
    else:
        weight_oi = matrices[side] + layer.scaling["default"] * B[rows] @ A[slot]
    if f"lora_magnitude_{side}" not in parameters:
        return weight_oi
    magnitude_o = parameters[f"lora_magnitude_{side}"][slot if side == "down" else rows]
    return weight_oi * (magnitude_o / weight_oi.detach().norm(dim=1)).unsqueeze(1)


def looped(
    layer: DoraExperts,
    parameters: Mapping[str, Tensor],
    hidden_TH: Tensor,
    index_TK: Tensor,
    weights_TK: Tensor,
    *,
    mask_C: Tensor | None = None,
) -> Tensor:
    """Expert by expert; `mask_C`, expert by expert in the router's order, is what a cut would leave of the channels."""
    experts = layer.experts
    mask_C = torch.ones(sum(experts.widths), dtype=torch.bool) if mask_C is None else mask_C
    output_TH = hidden_TH * 0.0
    for expert, mask_n in enumerate(mask_C.split(experts.widths)):
        if not experts.widths[expert]:
            continue
        gate_nH, up_nH, down_Hn = (adapted_matrix(layer, parameters, expert=expert, side=side) for side in SIDES)
        channel_Tn = functional.silu(hidden_TH @ gate_nH.T) * (hidden_TH @ up_nH.T) * mask_n
        gate_T = torch.where(index_TK == expert, weights_TK, 0).sum(1)
        output_TH = output_TH + gate_T[:, None] * (channel_Tn @ down_Hn.T)
    return output_TH


@given(case=adapted_cases())
@cases(80)
def test_outputs_and_gradients_equal_the_loop(case):
    layer, index_TK = case.layer(), case.routed.index_TK
    parameters, names = leaves(layer), list(layer.adapter_parameters("default"))
    results = []
    for function, own, dtype in (
        (layer, list(layer.adapter_parameters("default").values()), case.routed.dtype),
        (lambda *inputs: looped(layer, parameters, *inputs), [parameters[name] for name in names], torch.float64),
    ):
        hidden_TH, weights_TK = (value.to(dtype).requires_grad_() for value in case.routed.inputs)
        output_TH = function(hidden_TH, index_TK, weights_TK)
        target_TH = torch.randn(output_TH.shape, generator=generator_of(7), dtype=torch.float64).to(output_TH.dtype)
        inputs = [hidden_TH, weights_TK, *own]
        loss = (output_TH * target_TH).sum()
        results.append([output_TH.detach(), *torch.autograd.grad(loss, inputs, materialize_grads=True)])
    assert_close(*results, tolerance=case.tolerance)


@pytest.mark.parametrize("rank", [4, 8])
def test_experts_of_one_channel_under_an_adapter(rank):
    """Their A of the down projection is a view of one column, which the grouped product refuses."""
    one = Routed(widths=(1, 1, 2), hidden=64, dtype=torch.float32, index_TK=torch.tensor([[0, 1], [1, 2]]), seed=0)
    layer = Adapted(routed=one, rank=rank, use_dora=True, packed=True).layer()
    hidden_TH, weights_TK = one.inputs
    merged = layer.merged_experts(dtype=torch.float32)
    with torch.no_grad():
        outputs = [module(hidden_TH, one.index_TK, weights_TK) for module in (layer, merged)]
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-3)


@given(case=adapted_cases())
@cases(40)
def test_merged_experts_are_the_adapted_ones(case):
    layer, (hidden_TH, weights_TK) = case.layer(), case.routed.inputs
    merged = layer.merged_experts(dtype=case.routed.dtype)
    with torch.no_grad():
        outputs = [[module(hidden_TH, case.routed.index_TK, weights_TK)] for module in (layer, merged)]
    assert_close(*outputs, tolerance=case.tolerance)


@given(case=adapted_cases(), seed=seeds, masked=st.booleans())
@cases(60)
def test_a_cut_under_an_adapter_is_the_mask(case, seed, masked):
    """`masked`: experts without channels stay in the router, as under groups; else they leave it."""
    layer, generator = case.layer(), generator_of(seed)
    num_experts, parameters = len(case.routed.widths), leaves(layer)
    gone_E = torch.rand(num_experts, generator=generator) < 0.3
    keep_C = torch.rand(sum(case.routed.widths), generator=generator) < 0.6
    keep_C &= ~gone_E.repeat_interleave(torch.tensor(case.routed.widths))
    widths = [int(part.sum()) for part in keep_C.split(case.routed.widths)]
    kept = [expert for expert, width in enumerate(widths) if width or masked] or [0]
    place_E = torch.zeros(num_experts, dtype=torch.int64)
    place_E[kept] = torch.arange(len(kept))
    index_TK = torch.tensor(kept)[case.routed.index_TK % len(kept)]
    hidden_TH, weights_TK = case.routed.inputs
    with torch.no_grad():
        expected = looped(layer, parameters, hidden_TH.double(), index_TK, weights_TK.double(), mask_C=keep_C)
    cut_dora_experts(layer, keep_C=keep_C, kept_experts=kept)
    assert layer.experts.widths == tuple(widths[expert] for expert in kept)
    with torch.no_grad():
        assert_close([layer(hidden_TH, place_E[index_TK], weights_TK)], [expected], tolerance=case.tolerance)
