"""Padded export: a stock checkpoint that any engine loads, of the size of its widest expert.

E experts, n channels of an expert, N channels of the widest one, H hidden.
"""

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from lightning_moe.export.huggingface import check_replaceable
from lightning_moe.export.place import check_room, disk_errors
from lightning_moe.export.stock_config import add_older_fields
from lightning_moe.export.stock_keys import set_engine_fields
from lightning_moe.files import write_atomically
from lightning_moe.models.channel_experts import ChannelExperts
from lightning_moe.models.discovery import (
    MoeLayer,
    expert_matrices,
    expert_widths,
    is_grouped,
    layer_shape,
    moe_layers,
)
from lightning_moe.models.routers import MaskedDeepseekV2Router, without_adapter

# transformers' grouped products refuse rows that are not whole 16-byte units, 8 numbers in 16 bit.
WIDTH_MULTIPLE = 8


def export_padded(model: PreTrainedModel, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Writes a cut model (16 bit or NF4) as a stock checkpoint with the same logits: loads without this package.

    Every expert gets zero channels up to the widest expert of the model, rounded up to a multiple of 8
    (`h = act(0) * 0 = 0`); 4-bit weights are dequantised, and shared experts whose width the config derives from the
    experts' are padded too. It saves memory only as far as *every* expert became narrower: a plan of one width gives
    the smaller, uniform checkpoint. Evicted experts stay away if each layer (and each group of a grouped router) lost
    as many, or if the router biases sigmoid scores (-inf keeps the padding from being chosen). One decoder layer at a
    time is held twice. The model type `deepseek` is not native to transformers: its export loads where an engine
    knows it.

    Args:
        model: The cut model.
        folder: Where it goes.
        dtype: Stored type; the model's own if None. Selection biases keep theirs.

    Raises:
        ValueError: novices, no stock router can leave out this model's evicted experts, `folder` is not a model's, or
            the disk does not take it.
    """
    check_replaceable(folder)
    layers = moe_layers(model)
    dtype = _dtype_of(model) if dtype is None else dtype
    config = padded_config(model)
    config.dtype = str(dtype).removeprefix("torch.")
    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(config)
    check_room(folder, model=stock, dtype=dtype)
    with disk_errors(folder), write_atomically(folder) as temporary:
        temporary.mkdir()
        config.save_pretrained(temporary)
        add_older_fields(temporary)
        if model.can_generate() and model.generation_config is not None:
            model.generation_config.save_pretrained(temporary)
        _write_shards(_PaddedTensors(model=model, stock=stock, layers=layers, dtype=dtype), temporary)


def padded_config(model: PreTrainedModel) -> PretrainedConfig:
    """The stock config of the padded model.

    Raises:
        ValueError: no stock checkpoint is possible, see `export_padded`.
    """
    layers = moe_layers(model)
    config = copy.deepcopy(model.config)
    vars(config).pop("quantization_config", None)
    config.dtype = str(_dtype_of(model)).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    text_config, family = config.get_text_config(), layers[0].family
    widest = max(max(expert_widths(layer.experts)) for layer in layers)
    width = -(-widest // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
    if family.shared_count is not None:
        shared_width = getattr(text_config, family.expert_width) * getattr(text_config, family.shared_count)
        setattr(text_config, family.shared_count, -(-shared_width // width))
    setattr(text_config, family.expert_width, width)
    setattr(text_config, family.expert_count, _padded_count(layers))
    set_engine_fields(text_config)
    return config


def _dtype_of(model: PreTrainedModel) -> torch.dtype:
    """The type of the embeddings, which are never packed."""
    return model.get_input_embeddings().get_parameter("weight").dtype


def check_novices(layers: Sequence[MoeLayer]) -> None:
    """Refuses constants in the place of experts.

    Raises:
        ValueError: names the first layer that has some.
    """
    for layer in layers:
        experts = layer.base_experts
        if isinstance(experts, ChannelExperts) and experts.novices is not None:
            raise ValueError(
                f"'{layer.name}' has {len(experts.novice_experts)} novices, constants that a stock checkpoint has no "
                "place for. Export `ragged`, or cut without novices."
            )


def _padded_count(layers: list[MoeLayer]) -> int:
    """Experts of each layer of the padded model.

    Raises:
        ValueError: novices, or layers kept different numbers of experts and the router has no bias to keep the padding
            away with.
    """
    check_novices(layers)
    kept, family = kept_experts(layers), layers[0].family
    for layer, own in zip(layers, kept, strict=True):
        if isinstance(without_adapter(layer.router), MaskedDeepseekV2Router) and 0 in _widths(layer, own):
            raise ValueError(
                f"'{layer.name}' lost experts behind a grouped router without selection bias: a stock checkpoint "
                "cannot leave them out without changing the routing, unless every group of every layer lost as many. "
                "Export `ragged`, or plan without evictions (`plan --method_args '{expert_floor: 16}'`, or "
                "`--method uniform`)."
            )
    counts = [len(own) for own in kept]
    # A bias added to sigmoid scores; softmax scores would change with the padded rows, and the biased choice with them.
    can_pad = family.selection_bias is not None and family.score == "sigmoid"
    if len(set(counts)) > 1 and not can_pad:
        raise ValueError(
            f"The layers kept {min(counts)} to {max(counts)} experts. A stock checkpoint has one number, and a router "
            "of softmax scores would choose padded experts. Export `ragged`, or plan so "
            "that no expert leaves (`plan --method_args '{expert_floor: 16}'`, or `--method uniform`)."
        )
    return max(counts)


def kept_experts(layers: Sequence[MoeLayer]) -> list[list[int]]:
    """The experts of each layer that a stock checkpoint holds, as the router here counts them.

    A grouped router here keeps the rows of experts that are gone. They go for good where every group of every layer has
    as many left; otherwise all stay.
    """
    every = [list(range(len(expert_widths(layer.experts)))) for layer in layers]
    alive = [[e for e in own if expert_widths(layer.experts)[e]] for layer, own in zip(layers, every, strict=True)]
    groups: set[int] = set()
    for layer, own, left in zip(layers, every, alive, strict=True):
        if not is_grouped(layer):
            return every
        num_groups = layer_shape(layer).num_groups
        size = len(own) // num_groups
        groups |= {sum(e // size == group for e in left) for group in range(num_groups)}
    return alive if len(groups) == 1 else every


def _widths(layer: MoeLayer, experts: Sequence[int]) -> list[int]:
    return [expert_widths(layer.experts)[expert] for expert in experts]


@dataclass(frozen=True, kw_only=True)
class _PaddedTensors:
    """The padded model's tensors, made on request.

    Args:
        model: the cut model.
        stock: the padded model on the meta device: its names and shapes are what gets written.
        layers: MoE layers of the cut model.
        dtype: type of what is written.
    """

    model: PreTrainedModel
    stock: PreTrainedModel
    layers: list[MoeLayer]
    dtype: torch.dtype

    @cached_property
    def _state(self) -> dict[str, Tensor]:
        return self.model.state_dict()

    @cached_property
    def _kept(self) -> dict[str, list[int]]:
        """Written experts of each layer by its name."""
        names = [layer.name for layer in self.layers]
        return dict(zip(names, kept_experts(self.layers), strict=True))

    @cached_property
    def _router_rows(self) -> dict[str, tuple[int, list[int]]]:
        """Full name of each router tensor: the dimension of its experts, and which are written."""
        return {
            f"{layer.router_name}.{name}": (dim, self._kept[layer.name])
            for layer in self.layers
            for name, dim in layer.family.router_rows.items()
        }

    @cached_property
    def _selection_biases(self) -> set[str]:
        """Full names of the biases that keep padded experts from being chosen."""
        return {f"{layer.router_name}.{layer.family.selection_bias}" for layer in self.layers}

    def parts(self) -> Iterator[dict[str, Tensor]]:
        """Tensors of each MoE decoder layer, and at the end of everything else."""
        tied = self.stock.all_tied_weights_keys
        shapes = {name: value.shape for name, value in self.stock.state_dict().items() if name not in tied}
        for layer in self.layers:
            prefix = f"{layer.block_name.rpartition('.')[0]}."
            own = {name: shapes.pop(name) for name in list(shapes) if name.startswith(prefix)}
            experts = self._expert_tensors(layer, own)
            yield experts | {name: self._tensor(name, shape) for name, shape in own.items() if name not in experts}
        yield {name: self._tensor(name, shape) for name, shape in shapes.items()}

    def _expert_tensors(self, layer: MoeLayer, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
        """Fused stock tensors `[E, 2N, H]` and `[E, H, N]` of one layer."""
        gate_up_name, down_name = f"{layer.name}.gate_up_proj", f"{layer.name}.down_proj"
        dtype = self.dtype
        device = without_adapter(layer.router).get_parameter("weight").device
        gate_up_ENH = torch.zeros(shapes[gate_up_name], dtype=dtype, device=device)
        down_EHN = torch.zeros(shapes[down_name], dtype=dtype, device=device)
        padded_width = down_EHN.shape[2]
        for place, expert in enumerate(self._kept[layer.name]):
            gate_nH, up_nH, down_nH = expert_matrices(layer.experts, expert, dtype=dtype)
            width = len(gate_nH)
            gate_up_ENH[place, :width] = gate_nH.detach()
            gate_up_ENH[place, padded_width : padded_width + width] = up_nH.detach()
            down_EHN[place, :, :width] = down_nH.detach().T
        return {gate_up_name: gate_up_ENH, down_name: down_EHN}

    def _tensor(self, name: str, shape: torch.Size) -> Tensor:
        """A tensor outside the experts, dequantised, and padded where the stock model's is larger."""
        owner = self.model.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, Linear4bit) and name.endswith(".weight"):
            weight = cast(Params4bit, owner.weight)
            value = dequantize_4bit(weight.data, weight.quant_state).to(self.dtype)
        else:
            value = self._state[name].detach()
            if value.dtype == _dtype_of(self.model) and name not in self._selection_biases:
                value = value.to(self.dtype)
        if name in self._router_rows:
            dim, rows = self._router_rows[name]
            value = value.index_select(dim, torch.tensor(rows, device=value.device))
        return _pad(value, shape, fill=float("-inf") if name in self._selection_biases else 0.0)


def _pad(value: Tensor, shape: torch.Size, *, fill: float) -> Tensor:
    """`value` in the first corner of a tensor of `shape` (itself where the shapes are equal)."""
    if value.shape == shape:
        return value
    padded = value.new_full(shape, fill)
    padded[tuple(slice(size) for size in value.shape)] = value
    return padded


def _write_shards(tensors: _PaddedTensors, folder: Path) -> None:
    """One safetensors file per part, in the family's published names, and their index."""
    total = len(tensors.layers) + 1
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for number, part in enumerate(tensors.parts(), start=1):
        file = f"model-{number:05d}-of-{total:05d}.safetensors"
        published = revert_weight_conversion(tensors.stock, part)
        plain = {name: value.cpu().contiguous().clone() for name, value in published.items()}
        save_file(plain, str(folder / file), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(plain, file)
        total_bytes += sum(value.numel() * value.element_size() for value in plain.values())
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
