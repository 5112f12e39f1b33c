"""Selection of rows: what a cut does to a parameter and to the experts of a layer.  E experts, C channels, H hidden."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_moe.models.channel_experts import PROJECTIONS, ChannelExperts


@dataclass(frozen=True, kw_only=True, eq=False)
class RowSelection:
    """One parameter that a cut replaced: `new = old.index_select(dim, index)`. What an optimizer needs to follow.

    Down magnitudes of DoRA are selected and then rescaled; their moments are selected only.
    """

    old: nn.Parameter
    new: nn.Parameter
    dim: int
    index: Tensor


def select_parameter(old: nn.Parameter, index: Tensor, *, dim: int = 0) -> RowSelection:
    """A new parameter with these entries `[n]` of `dim`, as trainable as the old one."""
    index = index.to(old.device)
    new = nn.Parameter(old.detach().index_select(dim, index), requires_grad=old.requires_grad)
    return RowSelection(old=old, new=new, dim=dim, index=index)


def select_rows(
    experts: ChannelExperts, *, keep_C: Tensor, kept_experts: Sequence[int]
) -> tuple[ChannelExperts, Tensor]:
    """ChannelExperts with the kept channels of the kept experts, and the rows (int64) it took from the old storage.

    Rows are copied once, projection by projection, and the old projection is given up right after.

    Args:
        experts: the experts; they lose their projections.
        keep_C: boolean, channels expert by expert in the router's order.
        kept_experts: experts that stay, ascending (all of them under a grouped router: width 0 is masked, and novices).
    """
    storage_C = experts.storage_order()
    rows_by_expert = [
        rows[kept] for rows, kept in zip(storage_C.split(experts.widths), keep_C.split(experts.widths), strict=True)
    ]
    rows_of_kept = [rows_by_expert[e] for e in kept_experts]
    pruned = ChannelExperts(
        widths=[len(rows) for rows in rows_of_kept],
        hidden_size=experts.hidden_size,
        act_fn=experts.act_fn,
        rows=no_rows,
    )
    pruned.origin = experts.origin.cut(keep_C)
    if experts.novices is not None:
        stay = [position for position, expert in enumerate(experts.novice_experts) if expert in kept_experts]
        places = [kept_experts.index(experts.novice_experts[position]) for position in stay]
        pruned.set_novices(places, experts.novices.detach()[stay])
    index_C = torch.cat([rows_of_kept[e] for e in pruned.slot_order])
    for name in PROJECTIONS:
        rows = experts.projection(name)
        device = next(rows.parameters()).device
        setattr(pruned, name, rows.select(index_C.to(device)))
        setattr(experts, name, nn.Identity())
    return pruned.train(experts.training), index_C


def no_rows(num_rows: int, hidden_size: int) -> nn.Module:
    """Placeholder storage: the caller sets the rows right after."""
    return nn.Identity()
