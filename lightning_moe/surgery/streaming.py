"""From a stock folder to a packed, optionally cut model, layer by layer.  E experts, C channels of a layer."""

import logging

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lightning_moe.models.channel_experts import PROJECTIONS, ChannelExperts, Origin
from lightning_moe.models.discovery import MoeLayer, expert_widths, model_shape, moe_layers
from lightning_moe.models.loading import DtypeName
from lightning_moe.models.streaming import StockFolder
from lightning_moe.progress import hidden
from lightning_moe.quantization.linears import linears_to_pack, pack_linear
from lightning_moe.quantization.nf4 import PackedRows, check_hidden_size, pack_experts
from lightning_moe.quantization.rounding import check_finite
from lightning_moe.records import PrunePlan
from lightning_moe.surgery.cut import cut_layer, select_rows, to_channel_experts

log = logging.getLogger(__name__)

# Experts are read, cut and packed in this many parts of a layer.
_PARTS = 8


def quantize_folder(
    source: str, *, plan: PrunePlan | None = None, dtype: DtypeName = "auto", progress: bool = True
) -> PreTrainedModel:
    """The model that `load_model`, `apply_plan` and `quantize_model` give, bit for bit, without ever holding it whole.

    Memory at its peak: the packed model, the weights that stay in 16 bit (embeddings, norms, routers), and in 16 bit
    the larger of an eighth of one layer's experts with its temporaries, and of the rest of a layer.

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
    model, layers = folder.model, moe_layers(folder.model)
    check_hidden_size(int(model.config.get_text_config().hidden_size))
    for layer in layers:
        folder.load(layer.router_name)
    if plan is not None:
        plan.check_fits(model_shape(model))
    by_decoder = {layer.block_name.rpartition(".")[0]: layer for layer in layers}
    for name in tqdm(folder.decoder_names, desc="Packing layers", disable=hidden(progress=progress)):
        if name in by_decoder:
            _pack_layer(folder, by_decoder[name], keep_C=None if plan is None else plan.keep[by_decoder[name].index])
        folder.load(name)
        _pack_linears(folder, below=f"{name}.")
    folder.finish()
    _pack_linears(folder, below="")
    if plan is not None:
        log.info("%s", plan.summary())
    return model.requires_grad_(False)


def _pack_layer(folder: StockFolder, layer: MoeLayer, *, keep_C: Tensor | None) -> None:
    """Replaces the stock experts of a layer, still on the meta device, by packed ones, and cuts its router."""
    stock, stock_widths = layer.experts, expert_widths(layer.experts)
    origin = Origin.whole(stock_widths)
    origin = origin if keep_C is None else origin.cut(keep_C)
    keep_by_expert = origin.kept_C.split(stock_widths)
    packed = ChannelExperts(
        widths=[int(kept.sum()) for kept in keep_by_expert],
        hidden_size=stock.get_parameter("down_proj").shape[1],
        act_fn=stock.get_submodule("act_fn"),
        rows=PackedRows,
    ).train(stock.training)
    for first, last in folder.expert_chunks(layer, size=-(-len(stock_widths) // _PARTS)):
        folder.load_experts(layer, first=first, last=last)
        part, keep = to_channel_experts(stock), torch.cat(keep_by_expert[first:last])
        part, _ = select_rows(part, keep_C=keep, kept_experts=list(range(last - first)))
        for name, weight in part.named_parameters():
            _check_finite(weight, name=f"{layer.name}.{name}", folder=folder)
        pack_experts(part)
        _place(part, into=packed, first=first)
    packed.origin = origin
    layer.block.set_submodule(layer.family.experts, packed)
    if keep_C is not None:  # evicted experts, now of width 0, leave the router or are masked in it
        cut_layer(layer, keep_C=torch.ones(sum(packed.widths), dtype=torch.bool))


def _place(part: ChannelExperts, *, into: ChannelExperts, first: int) -> None:
    """Copies the packed rows of some experts to where `into` stores the experts `first`, `first + 1`, ..."""
    source_C = part.storage_order()
    target_C = torch.cat([torch.arange(*into.row_range(first + expert)) for expert in range(part.num_experts)])
    for name in PROJECTIONS:
        stored = part.projection(name).state_dict()
        for key, tensor in into.projection(name).state_dict().items():
            tensor[target_C] = stored[key][source_C]


def _pack_linears(folder: StockFolder, *, below: str) -> None:
    for name in linears_to_pack(folder.model):
        linear = folder.model.get_submodule(name)
        if name.startswith(below) and isinstance(linear, nn.Linear):
            _check_finite(linear.weight, name=f"{name}.weight", folder=folder)
            folder.model.set_submodule(name, pack_linear(linear))


def _check_finite(weight: Tensor, *, name: str, folder: StockFolder) -> None:
    advice = "The checkpoint is damaged: write or download it again."
    if folder.dtype != "auto":
        advice = f"Its numbers do not fit `dtype: {folder.dtype}`, or the checkpoint is damaged: try `dtype: auto`."
    check_finite(weight.detach(), what=f"'{name}' of '{folder.source}'", advice=advice)
