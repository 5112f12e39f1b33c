"""Gives a stock model on the meta device the structure it was saved with, and checks it against the files.

Everything here runs before memory is taken for a weight: what `config.json` and the headers of the files say is not
trusted. E experts.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from bitsandbytes.nn.modules import Linear4bit
from torch import nn
from transformers import PreTrainedModel

from lightning_moe.export.packed_checks import check_packed_linear
from lightning_moe.models.channel_experts import ChannelExperts, DenseRows
from lightning_moe.models.discovery import MoeLayer, is_grouped, layer_shape, moe_layers
from lightning_moe.models.routers import keep_router_rows, mask_router_rows
from lightning_moe.models.stored_tensors import LazyTensor, open_files
from lightning_moe.quantization.linears import empty_linear4bit
from lightning_moe.quantization.nf4 import PackedRows


def restore_layers(
    model: PreTrainedModel,
    *,
    widths: Mapping[str, Sequence[int]],
    packed: bool,
    novices: Mapping[str, Sequence[int]] | None = None,
) -> None:
    """Swaps in ChannelExperts of the given widths and cuts or masks the routers.

    Raises:
        ValueError: the names are not those of the model's experts modules, or a layer's widths or novices do not fit
            its router.
    """
    layers, novices = {layer.name: layer for layer in moe_layers(model)}, novices or {}
    if set(layers) != set(widths) or not set(novices) <= set(layers):
        odd = sorted((set(layers) ^ set(widths)) | (set(novices) - set(layers)))
        raise ValueError(f"config.json declares widths for other experts modules than the model has: {odd[:4]}.")
    for name, layer in layers.items():
        own = tuple(novices.get(name, ()))
        _check_widths(layer, widths[name], novices=own)
        _restore_layer(layer, widths=widths[name], novices=own, packed=packed)


def _check_widths(layer: MoeLayer, widths: Sequence[int], *, novices: tuple[int, ...]) -> None:
    stock = layer_shape(layer)
    empty = [expert for expert, width in enumerate(widths) if width == 0]
    if list(novices) != sorted(set(novices) & set(empty)):
        raise ValueError(
            f"config.json: novices of '{layer.name}' must be experts of width 0, ascending, of {empty}, got "
            f"{list(novices)}."
        )
    if is_grouped(layer) and len(widths) != stock.num_experts:
        raise ValueError(
            f"config.json: '{layer.name}' has a grouped router, which keeps all {stock.num_experts} experts (0 for an "
            f"evicted one), got {len(widths)} widths."
        )
    if max(widths, default=0) > max(stock.widths):
        raise ValueError(
            f"config.json: '{layer.name}' has experts of at most {max(stock.widths)} channels, got {max(widths)}."
        )
    if not is_grouped(layer) and (len(widths) > stock.num_experts or len(empty) > len(novices)):
        raise ValueError(
            f"config.json: '{layer.name}' may have at most {stock.num_experts} experts, each of width >= 1 or a "
            f"novice, got widths {list(widths)}."
        )
    if len(widths) < stock.top_k:
        raise ValueError(f"config.json: '{layer.name}' needs top_k={stock.top_k} experts, got {len(widths)} widths.")


def _restore_layer(layer: MoeLayer, *, widths: Sequence[int], novices: tuple[int, ...], packed: bool) -> None:
    """Gives one stock layer the shape it was saved with."""
    stock = layer.experts
    _, hidden_size, _ = stock.get_parameter("down_proj").shape
    dtype = stock.get_parameter("down_proj").dtype

    def dense(num_rows: int, hidden: int) -> nn.Module:
        return DenseRows(torch.empty(num_rows, hidden, dtype=dtype))

    with torch.device("meta"):
        experts = ChannelExperts(
            widths=widths,
            hidden_size=hidden_size,
            act_fn=stock.get_submodule("act_fn"),
            rows=PackedRows if packed else dense,
        )
        experts.set_novices(novices, torch.empty(len(novices), hidden_size, dtype=dtype))
    if is_grouped(layer):
        evicted = [e for e, width in enumerate(widths) if width == 0 and e not in novices]
        layer.block.set_submodule(layer.family.router, mask_router_rows(layer.router, layer.family, evicted))
    else:
        keep_router_rows(layer.router, layer.family, range(len(widths)))
    layer.block.set_submodule(layer.family.experts, experts)
    with torch.device("cpu"):  # transformers calls this inside a meta context, where counting is not possible
        layer_shape(layer).check_reachable(widths)


def restore_linears(model: PreTrainedModel, *, names: Sequence[str]) -> None:
    """Puts empty 4-bit layers in the place of these Linear layers.

    Raises:
        ValueError: the model has no Linear layer of such a name.
    """
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    unknown = [name for name in names if name not in linears]
    if unknown:
        raise ValueError(f"config.json: `packed_linears` names {unknown[:3]}, which are no Linear layers of the model.")
    for name in names:
        model.set_submodule(name, empty_linear4bit(linears[name]))


def check_tensors(model: PreTrainedModel, *, files: Sequence[str]) -> None:
    """Compares the headers of safetensors files with the model on the meta device.

    Raises:
        ValueError: a file is damaged, or a tensor is missing, or has another shape, or is of another kind of number.
    """
    if not files or not all(file.endswith(".safetensors") for file in files):
        return
    stored, _ = open_files([Path(file) for file in files])
    packed = {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    tied = set(model.all_tied_weights_keys)
    for name, tensor in model.state_dict().items():
        if name in tied and name not in stored:
            continue
        expected = tuple(tensor.shape)
        if name in packed:
            expected = (packed[name].in_features * packed[name].out_features // 2, 1)
        if name not in stored:
            raise ValueError(f"'{files[0]}' and its shards lack the tensor '{name}' of the model in config.json.")
        _check_tensor(stored[name], shape=expected, dtype=tensor.dtype)
        if name in packed:
            check_packed_linear(name, stored=stored, shape=(packed[name].out_features, packed[name].in_features))


def _check_tensor(stored: LazyTensor, *, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if stored.shape != shape:
        raise ValueError(
            f"'{stored.key}' has shape {stored.shape} in '{stored.file}', but config.json declares {shape}."
        )
    fits = stored.dtype == dtype or (dtype.is_floating_point and stored.dtype.is_floating_point)
    if not fits or (stored.dtype.is_floating_point and stored.dtype.itemsize == 1):
        kind = "a weight in floating point" if dtype.is_floating_point else f"of type {dtype}"
        raise ValueError(
            f"'{stored.key}' in '{stored.file}' is stored as {stored.type_name}, but it is {kind}. Write it again."
        )


def align_rows(model: PreTrainedModel) -> None:
    """Copies expert rows that lie unaligned in a mapped file: grouped products on the CPU want 16 bytes."""
    for module in model.modules():
        if isinstance(module, DenseRows) and module.weight.data_ptr() % 16:
            module.weight.data = module.weight.data.clone()
