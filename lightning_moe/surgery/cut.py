"""Apply a PrunePlan to a model, in place, layer by layer.  E experts, C channels of a layer, N novices, H hidden."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from lightning_moe.adapters.cut import cut_dora_experts, cut_router_adapters
from lightning_moe.adapters.experts import DoraExperts
from lightning_moe.adapters.router import DoraRouter
from lightning_moe.models.channel_experts import ChannelExperts
from lightning_moe.models.conversion import to_channel_experts
from lightning_moe.models.discovery import MoeLayer, expert_widths, is_grouped, model_shape, moe_layers
from lightning_moe.models.routers import keep_router_rows, mask_router_rows, without_adapter
from lightning_moe.models.saving import save_with_widths
from lightning_moe.models.selection import RowSelection, select_rows
from lightning_moe.quantization.nf4 import PackedRows
from lightning_moe.records import PrunePlan
from lightning_moe.surgery.novices import Novices
from lightning_moe.surgery.optimizer_state import check_states, follow_cut
from lightning_moe.surgery.parameters import check_parameters
from lightning_moe.surgery.repair import Repair

log = logging.getLogger(__name__)


def apply_plan(
    model: PreTrainedModel,
    *,
    plan: PrunePlan,
    repair: Repair | None = None,
    novices: Novices | None = None,
    optimizers: Iterable[Optimizer] = (),
) -> None:
    """Cuts the channels and experts that the plan does not keep, and lets optimizers follow, layer by layer.

    Every layer becomes `ChannelExperts`; evicted experts leave the router (ungrouped) or are masked in it (grouped), or
    stay in it as novices.
    Works on stock experts, on ChannelExperts in 16 bit and on packed ones, whose rows are selected bit for bit, and
    under our adapters of experts and routers (see `cut_layer`).

    Args:
        model: the model that the plan was made for.
        plan: which channels stay.
        repair: new rows of W_down for this plan (`plan_repair`); packed experts get them packed.
        novices: what evicted experts leave behind (`mean_outputs`); nothing when not given.
        optimizers: of a training that goes on (`follow_cut`); called between two steps.

    Raises:
        ValueError: the plan was made for another model, repair or novices for another plan, or an optimizer keeps a
            state that cannot follow; the model is as it was then.
    """
    check_plan_fits(model, plan=plan)
    if repair is not None:
        repair.check_fits(plan)
    if novices is not None:
        novices.check_fits(plan)
    layers, optimizers = moe_layers(model), list(optimizers)
    check_parameters(layers)
    cut_parts = [part for layer in layers for part in (layer.experts, layer.router)]
    check_states(optimizers, parameters=(p for part in cut_parts for p in part.parameters()))
    for layer in layers:
        down_rows_CH = None if repair is None else repair.down_rows[layer.index]
        novices_NH = None if novices is None else novices.rows[layer.index].to(model.dtype)
        keep_C = plan.keep[layer.index]
        replaced = cut_layer(
            layer, keep_C=keep_C, down_rows_CH=down_rows_CH, novices_NH=novices_NH, reports=bool(optimizers)
        )
        follow_cut(optimizers, replaced=replaced)  # before the next layer: an optimizer keeps the old rows in memory
    save_with_widths(model)
    if not optimizers:  # in training one line says it (`ScheduledPruner`)
        log.info("%s", plan.summary())


def check_plan_fits(model: PreTrainedModel, *, plan: PrunePlan) -> None:
    """Refuses a plan that was made for another model, or that leaves a router too little.

    Raises:
        ValueError: names the first difference, or the layer.
    """
    plan.check_fits(model_shape(model))
    for layer in moe_layers(model):
        num_kept = sum(width > 0 for width in plan.widths(layer.index))
        if layer.family.router_groups == "top2_sum" and num_kept < 2:
            raise ValueError(
                f"'{layer.name}': the router of '{layer.family.model_type}' always looks for its two best experts, and "
                f"the plan keeps {num_kept}. Prune less, so that each layer keeps two."
            )


def cut_layer(
    layer: MoeLayer,
    *,
    keep_C: Tensor,
    down_rows_CH: Tensor | None = None,
    novices_NH: Tensor | None = None,
    reports: bool = True,
) -> list[RowSelection]:
    """Cuts one layer, in place: `keep_C` is boolean, channels expert by expert in the router's order.

    Adapters of ours around experts or router are cut with them and stay the same modules: the result is the function
    that masking would give, for every adapter and without one. Only parameters of ChannelExperts, of adapters and of
    the router are reported; stock experts are converted first.

    Args:
        layer: the layer.
        keep_C: channels that stay.
        down_rows_CH: new down rows of the kept channels, in the same order; not under an adapter.
        novices_NH: constant outputs of the experts that lose their last channels now, in the router's order.
        reports: return what was replaced. The old rows stay in memory for that; else those of a projection are given
            up as soon as it is cut, except under an adapter.

    Raises:
        ValueError: new down rows for adapted experts.
    """
    widths = [int(kept.sum()) for kept in keep_C.split(expert_widths(layer.experts))]
    grouped, novices = is_grouped(layer), _novices_after(layer, widths=widths, more=novices_NH is not None)
    kept_experts = [e for e, width in enumerate(widths) if width or grouped or e in novices]
    if isinstance(layer.experts, DoraExperts):
        if down_rows_CH is not None:
            raise ValueError(f"'{layer.name}' has adapters, and a repair refits bare weights: set `repair` to false.")
        replaced = cut_dora_experts(layer.experts, keep_C=keep_C, kept_experts=kept_experts)
    else:
        replaced = _cut_bare_experts(
            layer, keep_C=keep_C, kept_experts=kept_experts, down_rows_CH=down_rows_CH, reports=reports
        )
    if novices_NH is not None:
        _add_novices(layer, experts=[kept_experts.index(e) for e in novices], rows_NH=novices_NH)
    if grouped:
        _mask_router(layer, [e for e, width in enumerate(widths) if not width and e not in novices])
    elif len(kept_experts) < len(widths):
        replaced += _shrink_router(layer, kept_experts)
    return replaced


def _novices_after(layer: MoeLayer, *, widths: Sequence[int], more: bool) -> list[int]:
    """Novices there are, and with `more` the experts that lose their last channels now; ascending."""
    experts = layer.base_experts
    present = experts.novice_experts if isinstance(experts, ChannelExperts) else ()
    before = expert_widths(experts)
    lost = [e for e, width in enumerate(widths) if width == 0 < before[e]] if more else []
    return sorted((*present, *lost))


def _add_novices(layer: MoeLayer, *, experts: Sequence[int], rows_NH: Tensor) -> None:
    """Adds the new novices' rows; `experts` are all novices of the cut layer, old and new."""
    base = layer.base_experts
    assert isinstance(base, ChannelExperts)
    all_NH = rows_NH.new_empty(len(experts), base.hidden_size, device=next(base.parameters()).device)
    is_old_N = torch.tensor([expert in base.novice_experts for expert in experts], dtype=torch.bool)
    if base.novices is not None:
        all_NH[is_old_N] = base.novices.detach().to(all_NH.dtype)
    all_NH[~is_old_N] = rows_NH.to(all_NH.device)
    base.set_novices(experts, all_NH)
    base.origin = replace(base.origin, replaced=base.origin.replaced or len(rows_NH) > 0)


def _cut_bare_experts(
    layer: MoeLayer, *, keep_C: Tensor, kept_experts: Sequence[int], down_rows_CH: Tensor | None, reports: bool
) -> list[RowSelection]:
    experts = to_channel_experts(layer.experts)
    old_rows = dict(experts.named_parameters()) if reports else {}
    pruned, index_C = select_rows(experts, keep_C=keep_C, kept_experts=kept_experts)
    if down_rows_CH is not None:
        replace_down_rows(pruned, rows_CH=down_rows_CH)
    layer.block.set_submodule(layer.family.experts, pruned)
    return [
        RowSelection(old=old_rows[name], new=parameter, dim=0, index=index_C.to(parameter.device))
        for name, parameter in pruned.named_parameters()
        if name in old_rows
    ]


def _mask_router(layer: MoeLayer, evicted: Sequence[int]) -> None:
    """Masks experts of a grouped router; an adapter around it stays as it is."""
    path = layer.family.router + (".base_layer" if isinstance(layer.router, DoraRouter) else "")
    layer.block.set_submodule(path, mask_router_rows(without_adapter(layer.router), layer.family, evicted))


def _shrink_router(layer: MoeLayer, kept_experts: Sequence[int]) -> list[RowSelection]:
    """Removes router rows, and those of its adapters, and reports the parameters that were replaced."""
    router, dims = without_adapter(layer.router), layer.family.router_rows
    old_rows = dict(router.named_parameters())
    keep_router_rows(router, layer.family, kept_experts)
    index_E = torch.tensor(list(kept_experts))
    replaced = [
        RowSelection(old=old_rows[name], new=parameter, dim=dims[name], index=index_E.to(parameter.device))
        for name, parameter in router.named_parameters()
        if name in dims
    ]
    if isinstance(layer.router, DoraRouter):
        replaced += cut_router_adapters(layer.router, kept=kept_experts)
    return replaced


def replace_down_rows(experts: ChannelExperts, *, rows_CH: Tensor) -> None:
    """Sets all down rows of a layer, in place; `rows_CH` is in the router's order, packed rows are packed again."""
    experts.origin = replace(experts.origin, refitted=True)
    old: nn.Module = experts.projection("down_proj")
    order_C = experts.storage_order()
    if isinstance(old, PackedRows):
        stored_CH = torch.empty_like(rows_CH)
        stored_CH[order_C] = rows_CH
        experts.down_proj = PackedRows.pack(stored_CH.to(old.codes.device))
    else:
        weight_CH = old.get_parameter("weight").data
        weight_CH[order_C.to(weight_CH.device)] = rows_CH.to(weight_CH)


def convert_experts(model: PreTrainedModel) -> None:
    """Turns every MoE layer into full-width ChannelExperts, in place: same function, ready for cuts during training.

    Experts that are so already, adapted ones too, stay as they are.
    """
    layers = moe_layers(model)
    check_parameters(layers)
    for layer in layers:
        if layer.experts is layer.base_experts:
            layer.block.set_submodule(layer.family.experts, to_channel_experts(layer.experts))
    save_with_widths(model)
