"""From a folder to cut and packed layers, one after the other.

E experts, C channels of a layer, N novices, H hidden.
"""

import logging
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lightning_moe.models.channel_experts import PROJECTIONS, ChannelExperts, DenseRows, Origin
from lightning_moe.models.conversion import to_channel_experts
from lightning_moe.models.discovery import MoeLayer, expert_widths, moe_layers
from lightning_moe.models.folders import LayerFolder
from lightning_moe.models.loading import DtypeName
from lightning_moe.models.selection import select_rows
from lightning_moe.models.streaming import StockFolder
from lightning_moe.progress import hidden
from lightning_moe.quantization.linears import linears_to_pack, pack_linear
from lightning_moe.quantization.nf4 import PackedRows, check_hidden_size, pack_experts
from lightning_moe.quantization.rounding import check_finite
from lightning_moe.records import PrunePlan
from lightning_moe.surgery.cut import check_plan_fits, cut_layer

log = logging.getLogger(__name__)

# Experts are read, cut and packed in this many parts of a layer, at most: converting a part takes some three times it.
NUM_PARTS = 32


def quantize_folder(
    source: str, *, plan: PrunePlan | None = None, dtype: DtypeName = "auto", progress: bool = True
) -> PreTrainedModel:
    """The model that `load_model`, `apply_plan` and `quantize_model` give, bit for bit, without ever holding it whole.

    Memory at its peak: the packed model, the weights that stay in 16 bit (embeddings, norms, routers), and in 16 bit
    the larger of a few of one layer's experts with their temporaries, and of the rest of a layer.

    Args:
        source: folder, `asset:small_moe`, or hub name of a stock model.
        plan: which channels stay; all without one.
        dtype: type of the weights that stay unpacked; `auto` keeps the stored one.
        progress: show a bar over the layers (on a terminal).

    Returns:
        The packed model on the CPU, frozen, in eval mode.

    Raises:
        ValueError: the folder is damaged or not stock, a weight that would be packed is NaN or infinite, the hidden
            size is not a multiple of 64, or the plan was made for another model.
    """
    folder = StockFolder(source, dtype=dtype)
    model = folder.model
    check_hidden_size(int(model.config.get_text_config().hidden_size))
    if plan is not None:
        check_plan(folder, plan=plan)
    linears = linears_to_pack(model)
    for name in tqdm(folder.decoder_names, desc="Packing layers", disable=hidden(progress=progress)):
        layer = moe_layer_of(folder, name)
        keep_C = None if plan is None or layer is None else plan.keep[layer.index]
        load_cut_decoder(folder, name, keep_C=keep_C, packs=True)
        pack_decoder(folder, name, linears=linears)
    folder.finish()
    pack_linears(folder, names=[name for name in linears if type(model.get_submodule(name)) is nn.Linear])
    if plan is not None:
        log.info("%s", plan.summary())
    return model.requires_grad_(False)


def check_plan(folder: LayerFolder, *, plan: PrunePlan) -> None:
    """Refuses a plan as `check_plan_fits` does; of the weights only the routers are read.

    Raises:
        ValueError: names the first difference, or the layer.
    """
    names = [layer.router_name for layer in moe_layers(folder.model)]
    for name in names:
        folder.load(name)
    check_plan_fits(folder.model, plan=plan)
    for name in names:
        folder.release(name)


def moe_layer_of(folder: LayerFolder, name: str) -> MoeLayer | None:
    """The MoE layer in a decoder layer; None where that one is dense."""
    return next((layer for layer in moe_layers(folder.model) if layer.block_name.rpartition(".")[0] == name), None)


def load_cut_decoder(
    folder: LayerFolder,
    name: str,
    *,
    keep_C: Tensor | None,
    packs: bool,
    novices_NH: Tensor | None = None,
    device: str = "cpu",
) -> None:
    """Loads a decoder layer and cuts it: what `load_decoder` and `cut_layer` give, and `pack_experts` with `packs`.

    Experts of a stock folder are read, cut and packed a few at a time, so that the layer is never there as a whole.

    Args:
        folder: the checkpoint.
        name: one of its decoder layers.
        keep_C: channels that stay, expert by expert in the router's order; all without it.
        packs: whether the experts go to 4 bit.
        novices_NH: constant outputs of the experts that lose their last channels.
        device: where the layer is cut, and ends up.

    Raises:
        ValueError: a weight cannot be read, or one that would be packed is NaN or infinite.
    """
    layer = moe_layer_of(folder, name)
    if layer is not None and isinstance(folder, StockFolder):
        _load_in_parts(folder, layer, keep_C=keep_C, packs=packs, novices_NH=novices_NH, device=device)
        folder.load(name)
        folder.model.get_submodule(name).to(device)
        if 0 in expert_widths(layer.experts):  # evicted experts leave the router or are masked in it
            cut_layer(layer, keep_C=torch.ones(sum(expert_widths(layer.experts)), dtype=torch.bool), reports=False)
        return
    folder.load_decoder(name)
    folder.model.get_submodule(name).to(device)
    layer = moe_layer_of(folder, name)
    if layer is not None and keep_C is not None:
        cut_layer(layer, keep_C=keep_C, novices_NH=novices_NH, reports=False)


def pack_decoder(folder: LayerFolder, name: str, *, linears: Iterable[str]) -> None:
    """Puts a decoder layer in 4 bit as `quantize_model` does: experts, and those of the Linear layers that are in it.

    Raises:
        ValueError: a weight is NaN or infinite.
    """
    layer = moe_layer_of(folder, name)
    if layer is not None:
        assert isinstance(layer.experts, ChannelExperts)
        if not layer.experts.packed:
            _check_experts(layer.experts, name=layer.name, folder=folder)
        pack_experts(layer.experts)
    pack_linears(folder, names=[linear for linear in linears if linear.startswith(f"{name}.")])


def pack_linears(folder: LayerFolder, *, names: Iterable[str]) -> None:
    """Puts Linear layers, which are loaded, in 4 bit.

    Raises:
        ValueError: a weight is NaN or infinite.
    """
    for name in names:
        linear = folder.model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        _check_finite(linear.weight, name=f"{name}.weight", folder=folder)
        folder.model.set_submodule(name, pack_linear(linear))


def _load_in_parts(
    folder: StockFolder,
    layer: MoeLayer,
    *,
    keep_C: Tensor | None,
    packs: bool,
    novices_NH: Tensor | None,
    device: str,
) -> None:
    """Replaces the stock experts of a layer, still on the meta device, by cut ones; evicted experts have width 0."""
    stock, stock_widths = layer.experts, expert_widths(layer.experts)
    origin = Origin.whole(stock_widths)
    origin = origin if keep_C is None else origin.cut(keep_C)
    keep_by_expert = origin.kept_C.split(stock_widths)
    whole = _empty_experts(stock, widths=[int(kept.sum()) for kept in keep_by_expert], packs=packs)
    for first, last in folder.expert_chunks(layer, size=-(-len(stock_widths) // NUM_PARTS)):
        folder.load_experts(layer, first=first, last=last)
        part, keep = to_channel_experts(stock).to(device), torch.cat(keep_by_expert[first:last])
        part, _ = select_rows(part, keep_C=keep, kept_experts=list(range(last - first)))
        if packs:
            _check_experts(part, name=layer.name, folder=folder)
            pack_experts(part)
        _place(part, into=whole, first=first)
    if novices_NH is not None:
        gone = [expert for expert, width in enumerate(whole.widths) if width == 0]
        whole.set_novices(gone, novices_NH)
        origin = replace(origin, replaced=bool(gone))
    whole.origin = origin
    layer.block.set_submodule(layer.family.experts, whole)


def _empty_experts(stock: nn.Module, *, widths: list[int], packs: bool) -> ChannelExperts:
    """Experts of these widths on the CPU, to be filled, beside the stock ones that they replace."""
    dtype = stock.get_parameter("down_proj").dtype
    return ChannelExperts(
        widths=widths,
        hidden_size=stock.get_parameter("down_proj").shape[1],
        act_fn=stock.get_submodule("act_fn"),
        rows=PackedRows if packs else lambda num_rows, size: DenseRows(torch.empty(num_rows, size, dtype=dtype)),
    ).train(stock.training)


def _place(part: ChannelExperts, *, into: ChannelExperts, first: int) -> None:
    """Copies the rows of some experts to where `into` stores the experts `first`, `first + 1`, ..."""
    source_C = part.storage_order()
    target_C = torch.cat([torch.arange(*into.row_range(first + expert)) for expert in range(part.num_experts)])
    for name in PROJECTIONS:
        stored = part.projection(name).state_dict()
        for key, tensor in into.projection(name).state_dict().items():
            tensor[target_C] = stored[key].cpu()[source_C]


def _check_experts(experts: ChannelExperts, *, name: str, folder: LayerFolder) -> None:
    for parameter_name, weight in experts.named_parameters():
        _check_finite(weight, name=f"{name}.{parameter_name}", folder=folder)


def _check_finite(weight: Tensor, *, name: str, folder: LayerFolder) -> None:
    advice = "The checkpoint is damaged: write or download it again."
    if folder.dtype != "auto":
        advice = f"Its numbers do not fit `dtype: {folder.dtype}`, or the checkpoint is damaged: try `dtype: auto`."
    check_finite(weight.detach(), what=f"'{name}' of '{folder.source}'", advice=advice)
