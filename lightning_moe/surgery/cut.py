"""Apply a PrunePlan to a model, in place, layer by layer.  E experts, C channels of a layer, H hidden."""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_moe.models.channel_experts import PROJECTIONS, ChannelExperts, DenseRows
from lightning_moe.models.discovery import MoeLayer, is_grouped, model_shape, moe_layers
from lightning_moe.models.routers import keep_router_rows, mask_router_rows
from lightning_moe.quantization.nf4 import PackedRows
from lightning_moe.records import PrunePlan
from lightning_moe.surgery.repair import Repair

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class RowSelection:
    """One parameter that a cut replaced: `new = old.index_select(dim, index)`. What an optimizer needs to follow."""

    old: nn.Parameter
    new: nn.Parameter
    dim: int
    index: Tensor


def apply_plan(model: PreTrainedModel, *, plan: PrunePlan, repair: Repair | None = None) -> list[RowSelection]:
    """Cuts the channels and experts that the plan does not keep; returns which parameters were replaced, and how.

    Every layer becomes `ChannelExperts`; evicted experts leave the router (ungrouped) or are masked in it (grouped).
    Works on stock experts, on ChannelExperts in 16 bit and on packed ones, whose rows are selected bit for bit.

    Args:
        model: the model that the plan was made for.
        plan: which channels stay.
        repair: new rows of W_down for this plan (`plan_repair`); packed experts get them packed.

    Raises:
        ValueError: the plan was made for another model, or the repair for another plan.
    """
    plan.check_fits(model_shape(model))
    if repair is not None:
        repair.check_fits(plan)
    replaced: list[RowSelection] = []
    for layer in moe_layers(model):
        down_rows_CH = None if repair is None else repair.down_rows[layer.index]
        replaced += cut_layer(layer, keep_C=plan.keep[layer.index], down_rows_CH=down_rows_CH)
    log.info("%s", plan.summary())
    return replaced


def cut_layer(layer: MoeLayer, *, keep_C: Tensor, down_rows_CH: Tensor | None = None) -> list[RowSelection]:
    """Cuts one layer, in place: `keep_C` is boolean, channels expert by expert in the router's order.

    `down_rows_CH` are new down rows of the kept channels, in the same order. Only parameters of ChannelExperts and of
    the router are reported; stock experts are converted first.
    """
    experts = to_channel_experts(layer.experts)
    keep_by_expert = keep_C.split(experts.widths)
    widths = [int(kept.sum()) for kept in keep_by_expert]
    evicted = [e for e, width in enumerate(widths) if width == 0]
    grouped = is_grouped(layer)
    kept_experts = [e for e, width in enumerate(widths) if width or grouped]
    old_rows = dict(experts.named_parameters())
    pruned, index_C = select_rows(experts, keep_C=keep_C, kept_experts=kept_experts)
    if down_rows_CH is not None:
        replace_down_rows(pruned, rows_CH=down_rows_CH)
    replaced = [
        RowSelection(old=old_rows[name], new=parameter, dim=0, index=index_C.to(parameter.device))
        for name, parameter in pruned.named_parameters()
    ]
    if grouped:
        layer.block.set_submodule(layer.family.router, mask_router_rows(layer.router, layer.family, evicted))
    elif evicted:
        replaced += _shrink_router(layer, kept_experts)
    layer.block.set_submodule(layer.family.experts, pruned)
    return replaced


def _shrink_router(layer: MoeLayer, kept_experts: list[int]) -> list[RowSelection]:
    """Removes router rows and reports the parameters that were replaced."""
    old_rows = dict(layer.router.named_parameters())
    keep_router_rows(layer.router, layer.family, kept_experts)
    index_E = torch.tensor(kept_experts)
    return [
        RowSelection(
            old=old_rows[name], new=parameter, dim=layer.family.router_rows[name], index=index_E.to(parameter.device)
        )
        for name, parameter in layer.router.named_parameters()
        if name in layer.family.router_rows
    ]


def select_rows(experts: ChannelExperts, *, keep_C: Tensor, kept_experts: list[int]) -> tuple[ChannelExperts, Tensor]:
    """ChannelExperts with the kept channels of the kept experts, and the rows (int64) it took from the old storage.

    Rows are copied once, projection by projection, and the old projection is given up right after.
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
        rows=_no_rows,
    )
    index_C = torch.cat([rows_of_kept[e] for e in pruned.slot_order])
    for name in PROJECTIONS:
        rows = experts.projection(name)
        device = next(rows.parameters()).device
        setattr(pruned, name, rows.select(index_C.to(device)))
        setattr(experts, name, nn.Identity())
    return pruned.train(experts.training), index_C


def replace_down_rows(experts: ChannelExperts, *, rows_CH: Tensor) -> None:
    """Sets all down rows of a layer, in place; `rows_CH` is in the router's order, packed rows are packed again."""
    old: nn.Module = experts.projection("down_proj")
    stored_CH = torch.empty_like(rows_CH)
    stored_CH[experts.storage_order()] = rows_CH
    if isinstance(old, PackedRows):
        experts.down_proj = PackedRows.pack(stored_CH.to(old.codes.device))
    else:
        old.get_parameter("weight").data.copy_(stored_CH)


def to_channel_experts(experts: nn.Module) -> ChannelExperts:
    """Stock experts as ChannelExperts of full width (the stock parameters are given up one by one)."""
    if isinstance(experts, ChannelExperts):
        return experts
    gate_up, down = experts.get_parameter("gate_up_proj"), experts.get_parameter("down_proj")
    num_experts, hidden_size, width = down.shape
    converted = ChannelExperts(
        widths=[width] * num_experts,
        hidden_size=hidden_size,
        act_fn=experts.get_submodule("act_fn"),
        rows=_no_rows,
    )
    trainable = gate_up.requires_grad
    gate_EnH, up_EnH = gate_up.detach().chunk(2, dim=1)
    for name, rows_EnH in zip(PROJECTIONS, (gate_EnH, up_EnH, down.detach().transpose(1, 2)), strict=True):
        # A copy even where a view would do: it must not keep the fused stock tensor alive.
        rows = DenseRows(rows_EnH.clone(memory_format=torch.contiguous_format).view(-1, hidden_size))
        rows.weight.requires_grad_(trainable)
        setattr(converted, name, rows)
    return converted.train(experts.training)


def convert_experts(model: PreTrainedModel) -> None:
    """Turns every MoE layer into full-width ChannelExperts, in place: same function, ready for cuts during training."""
    for layer in moe_layers(model):
        layer.block.set_submodule(layer.family.experts, to_channel_experts(layer.experts))


def _no_rows(num_rows: int, hidden_size: int) -> nn.Module:
    """Placeholder storage: the caller sets the rows right after."""
    return nn.Identity()
