"""Small ChannelExperts with random weights, a router's output, and a naive loop to compare with."""

# T tokens, K experts per token, E experts, n channels, H hidden

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_moe.models.channel_experts import PROJECTIONS, ChannelExperts
from lightning_moe.quantization.nf4 import pack_experts, unpack_experts

HIDDEN = 64
RAGGED = (16, 8, 24, 16, 8, 16, 32, 24)
UNALIGNED = (5, 7, 7, 12, 5, 0, 1, 7)


def random_experts(
    widths: tuple[int, ...], *, dtype: torch.dtype = torch.float32, seed: int = 0, hidden: int = HIDDEN
) -> ChannelExperts:
    torch.manual_seed(seed)
    experts = ChannelExperts(widths=widths, hidden_size=hidden, act_fn=nn.SiLU())
    for name in PROJECTIONS:
        experts.projection(name).get_parameter("weight").data.normal_(std=0.2)
    return experts.to(dtype)


def random_routing(*, num_tokens: int, num_experts: int, top_k: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    index_TK = torch.rand(num_tokens, num_experts, generator=generator).topk(top_k, dim=-1).indices
    return index_TK, torch.rand(num_tokens, top_k, generator=generator)


def naive(experts: ChannelExperts, hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Token by token and expert by expert, straight from the definition."""
    rows = []
    for token, (experts_K, weights_K) in enumerate(zip(index_TK.tolist(), weights_TK, strict=True)):
        total = torch.zeros_like(hidden_TH[token])
        for expert, weight in zip(experts_K, weights_K, strict=True):
            gate_nH, up_nH, down_nH = experts.expert_matrices(expert, dtype=hidden_TH.dtype)
            channel_n = experts.act_fn(gate_nH @ hidden_TH[token]) * (up_nH @ hidden_TH[token])
            total = total + weight.to(hidden_TH.dtype) * (channel_n @ down_nH)
        rows.append(total)
    return torch.stack(rows)


def gradients(
    function: Callable[[Tensor, Tensor], Tensor], hidden_TH: Tensor, weights_TK: Tensor, parameters: list[nn.Parameter]
) -> list[Tensor]:
    inputs = [hidden_TH.clone().requires_grad_(), weights_TK.clone().requires_grad_()]
    output = function(*inputs)
    target = torch.randn(output.shape, generator=torch.Generator().manual_seed(7)).to(output.dtype)
    return [
        output.detach(),
        *torch.autograd.grad((output * target).sum(), [*inputs, *parameters], materialize_grads=True),
    ]


def packed_pair(widths: tuple[int, ...]) -> tuple[ChannelExperts, ChannelExperts]:
    """The same experts packed, and dequantised to float32."""
    packed, dense = random_experts(widths), random_experts(widths)
    pack_experts(packed)
    pack_experts(dense)
    unpack_experts(dense, dtype=torch.float32)
    return packed, dense
