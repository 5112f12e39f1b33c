"""Stock experts as ChannelExperts.  E experts, n channels of each, H hidden."""

import torch
from torch import Tensor, nn

from lightning_moe.models.channel_experts import PROJECTIONS, ChannelExperts, DenseRows
from lightning_moe.models.selection import no_rows


def to_channel_experts(experts: nn.Module) -> ChannelExperts:
    """Stock experts as ChannelExperts of full width; ChannelExperts are returned as they are."""
    if isinstance(experts, ChannelExperts):
        return experts
    converted = without_rows(experts)
    for name, rows_EnH in zip(PROJECTIONS, stock_rows(experts), strict=True):
        # A copy even where a view would do: it must not keep the fused stock tensor alive.
        rows = DenseRows(rows_EnH.clone(memory_format=torch.contiguous_format).view(-1, converted.hidden_size))
        rows.weight.requires_grad_(experts.get_parameter("gate_up_proj").requires_grad)
        setattr(converted, name, rows)
    return converted


def without_rows(experts: nn.Module) -> ChannelExperts:
    """ChannelExperts in the shape of stock experts; the caller sets their rows right after."""
    num_experts, hidden_size, width = experts.get_parameter("down_proj").shape
    converted = ChannelExperts(
        widths=[width] * num_experts,
        hidden_size=hidden_size,
        act_fn=experts.get_submodule("act_fn"),
        rows=no_rows,
    )
    return converted.train(experts.training)


def stock_rows(experts: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Gate, up and transposed down projections of stock experts: views `[E, n, H]`."""
    gate_EnH, up_EnH = experts.get_parameter("gate_up_proj").detach().chunk(2, dim=1)
    return gate_EnH, up_EnH, experts.get_parameter("down_proj").detach().transpose(1, 2)
