"""What a model stores once its experts have given widths, from its config alone: no weight is read.

E experts of a layer in the router's order; widths are kept channels, 0 for an expert that is gone.
"""

import json
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

from lightning_moe.models.channel_experts import PROJECTIONS
from lightning_moe.models.discovery import MoeLayer, decoder_names, expert_widths, is_grouped, layer_shape, moe_layers
from lightning_moe.models.loading import DtypeName, config_errors, generation_config_of, read_config
from lightning_moe.models.routers import row_tensor
from lightning_moe.models.saving import QUANT_METHOD
from lightning_moe.models.sources import find_file
from lightning_moe.quantization.linears import linears_to_pack
from lightning_moe.quantization.nf4 import check_hidden_size
from lightning_moe.quantization.stored import (
    StoredTensor,
    as_stored,
    expert_tensors,
    packed_linear_tensors,
    sharded_bytes,
)
from lightning_moe.records import ModelShape

Bits = Literal[4, 16]
Widths = Sequence[Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class LayerSizes:
    """One MoE layer.

    Args:
        name: Full name of the experts module.
        widths: Channels of each expert before any cut, E numbers.
        top_k: Experts a token is routed to.
        router: Tensors with one entry per expert, each with the dimension of that entry.
        trained: Names of those of them that are parameters.
        grouped: The router keeps the rows of experts that are gone.
        mask: Name of the buffer that masks them, if the router needs one.
    """

    name: str
    widths: tuple[int, ...]
    top_k: int
    router: tuple[tuple[StoredTensor, int], ...]
    trained: frozenset[str]
    grouped: bool
    mask: str | None

    def kept(self, widths: Sequence[int]) -> list[int]:
        """Widths of the experts that the router still counts."""
        return list(widths) if self.grouped else [width for width in widths if width]

    def router_tensors(self, widths: Sequence[int]) -> list[StoredTensor]:
        """What the router stores for them."""
        count = len(self.kept(widths))
        tensors = [_resized(tensor, dim=dim, size=count) for tensor, dim in self.router]
        if self.mask is not None and 0 in widths:
            tensors.append(StoredTensor(name=self.mask, dtype=torch.bool, shape=(count,)))
        return tensors


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelSizes:
    """Stored parameters and bytes of a model as functions of the widths of its experts.

    Counted is the folder that `prune` writes: tensors as they are stored (4 bits: NF4 rows with an 8-bit scale per
    block and one fp32 scale per row, Linear layers around them in double-quantised NF4; embeddings, head, routers and
    norms in 16 bit), in a file for each decoder layer and one for the rest, the headers of the files, their index,
    `config.json` with every width, and `generation_config.json`. The tokenizer is left out, as in `model_bytes`. Exact
    in 16 bit; in 4 bit a few bytes above for each packed Linear layer, whose description spells out a number of the
    data's.

    Args:
        bits: 16, or 4 for NF4.
        hidden_size: H.
        expert_dtype: Type of expert rows in 16 bit.
        layers: The MoE layers.
        decoder_names: Full names of the decoder layers, dense ones included.
        fixed: Every tensor outside experts and routers.
        fixed_params: Parameters among them, counted before packing.
        config: Content of `config.json` without the widths.
        indent: Of that file.
        rest_bytes: Of `generation_config.json`.
    """

    bits: Bits
    hidden_size: int
    expert_dtype: torch.dtype
    layers: tuple[LayerSizes, ...]
    decoder_names: tuple[str, ...]
    fixed: tuple[StoredTensor, ...]
    fixed_params: int
    config: dict[str, Any]
    indent: int
    rest_bytes: int

    @property
    def dense(self) -> tuple[tuple[int, ...], ...]:
        """The widths before any cut."""
        return tuple(layer.widths for layer in self.layers)

    @property
    def channel_params(self) -> int:
        """Parameters of one channel: a row of each projection."""
        return len(PROJECTIONS) * self.hidden_size

    def stored_params(self, widths: Widths) -> int:
        """Logical parameters: a 4-bit weight counts as one, constants of the quantisation do not count."""
        count = self.fixed_params
        for layer, own in zip(self.layers, widths, strict=True):
            routers = sum(tensor.numel for tensor in layer.router_tensors(own) if tensor.name in layer.trained)
            count += routers + self.channel_params * sum(own)
        return count

    def active_params(self, widths: Widths, *, usage: Sequence[Tensor]) -> float:
        """Parameters that a token uses on average: all but the routed experts, and its share of those.

        Args:
            widths: Per layer, E numbers.
            usage: Per layer, the share of tokens that is routed to each expert `[E]` (it sums to top-k).
        """
        stored_channels = sum(sum(own) for own in widths)
        used = sum(float((share_E * torch.tensor(own)).sum()) for share_E, own in zip(usage, widths, strict=True))
        return self.stored_params(widths) + self.channel_params * (used - stored_channels)

    def tensors(self, widths: Widths) -> list[StoredTensor]:
        """Every tensor of the file."""
        found = list(self.fixed)
        for layer, own in zip(self.layers, widths, strict=True):
            found += layer.router_tensors(own)
            found += expert_tensors(
                layer.name,
                num_channels=sum(own),
                hidden_size=self.hidden_size,
                dtype=self.expert_dtype,
                packed=self.bits == 4,
            )
        return found

    def num_bytes(self, widths: Widths) -> int:
        """Bytes of the folder: the files of tensors, their index, and the two configs."""
        content = deepcopy(self.config)
        content["quantization_config"]["widths"] = {
            layer.name: layer.kept(own) for layer, own in zip(self.layers, widths, strict=True)
        }
        text = json.dumps(content, indent=self.indent) + "\n"
        files = sharded_bytes(self.tensors(widths), decoder_names=self.decoder_names)
        return files + len(text.encode()) + self.rest_bytes

    def check_fits(self, shape: ModelShape) -> None:
        """Refuses statistics or a plan of another model (one that was cut since has fewer channels and fits).

        Raises:
            ValueError: names the first difference.
        """
        mine, theirs = [layer.name for layer in self.layers], [layer.name for layer in shape.layers]
        if (self.hidden_size, mine) != (shape.hidden_size, theirs):
            raise ValueError(
                f"The sizes are of another model: hidden size {self.hidden_size} and {len(mine)} MoE layers from "
                f"'{mine[0]}' on, the statistics have {shape.hidden_size} and {len(theirs)} from '{theirs[0]}' on. "
                "Name the model that was calibrated."
            )
        for own, layer in zip(self.layers, shape.layers, strict=True):
            if len(layer.widths) > len(own.widths) or max(layer.widths) > max(own.widths):
                raise ValueError(
                    f"The sizes are of another model: {own.name} has {len(own.widths)} experts of at most "
                    f"{max(own.widths)} channels, the statistics have {len(layer.widths)} of at most "
                    f"{max(layer.widths)}. Name the model that was calibrated."
                )


def read_sizes(
    source: str, *, bits: Bits, dtype: DtypeName = "auto", stored_dtype: torch.dtype | None = None
) -> ModelSizes:
    """Sizes of a folder, asset or hub name: reads its `config.json` and, if it has one, `generation_config.json`.

    Raises:
        ValueError: see `sizes_of`; or there is no config, or its family is not supported.
    """
    own = None if dtype == "auto" else getattr(torch, dtype)
    config = read_config(source)
    with config_errors(source):
        sizes = sizes_of(config, bits=bits, dtype=own, stored_dtype=stored_dtype)
    rest = generation_bytes(source)
    return sizes if rest is None else replace(sizes, rest_bytes=rest)


def generation_bytes(source: str) -> int | None:
    """Bytes of the `generation_config.json` of a folder, asset or hub name, written anew; None if it has none."""
    file = find_file(source, "generation_config.json")
    if file is None:
        return None
    return _text_bytes(generation_config_of(source))


def sizes_of(
    config: PretrainedConfig, *, bits: Bits, dtype: torch.dtype | None = None, stored_dtype: torch.dtype | None = None
) -> ModelSizes:
    """Sizes of the models that a config describes, dense or cut; the model is built on the meta device.

    Args:
        config: Of a known family; widths of an earlier cut in it are left aside.
        bits: 16, or 4 for NF4.
        dtype: Type of the weights in memory; the config's own if None, float32 where it names none.
        stored_dtype: Type that matrices are stored in (`save_ragged(dtype=...)`); the same if None.

    Raises:
        ValueError: `bits` is neither 4 nor 16, the model cannot be stored in 4 bit or is so already, or has novices.
    """
    if bits not in get_args(Bits):
        raise ValueError(f"`bits` must be 16, or 4 for NF4, got {bits!r}.")
    if bits == 4:
        check_hidden_size(int(config.get_text_config().hidden_size))
    earlier: Any = config.to_dict().get("quantization_config") or {}
    if bits == 16 and earlier.get("packed_experts", False):
        raise ValueError("This model is in 4 bit already, and stays so when it is cut: count it with `bits` 4.")
    if earlier.get("novices"):
        raise ValueError(
            "This model has novices, whose constants are not counted: budget it by `prune_ratio`, `keep_ratio` or "
            "`active`, or take the model as it was before they were made."
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(deepcopy(config), dtype=dtype or config.dtype or torch.float32)
    return _measured(model, bits=bits, stored_dtype=stored_dtype)


def _measured(model: PreTrainedModel, *, bits: Bits, stored_dtype: torch.dtype | None) -> ModelSizes:
    layers = moe_layers(model)
    measured = tuple(_layer_sizes(layer) for layer in layers)
    packed = linears_to_pack(model) if bits == 4 else []
    names = _fixed_names(model, layers=measured)
    fixed = _fixed_tensors(model, names=names, packed=frozenset(packed), stored_dtype=stored_dtype)
    model.config.dtype = str(model.dtype if stored_dtype is None else stored_dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    described: dict[str, Any] = {"quant_method": QUANT_METHOD, "packed_experts": bits == 4, "packed_linears": packed}
    config = json.loads(model.config.to_json_string()) | {"quantization_config": described}
    return ModelSizes(
        bits=bits,
        hidden_size=int(model.config.get_text_config().hidden_size),
        expert_dtype=model.dtype if stored_dtype is None else stored_dtype,
        layers=measured,
        decoder_names=tuple(decoder_names(model)),
        fixed=fixed,
        fixed_params=sum(parameter.numel() for name, parameter in model.named_parameters() if name in names),
        config=config,
        indent=2 if stored_dtype in (None, model.dtype) else 1,
        rest_bytes=_text_bytes(model.generation_config),
    )


def _text_bytes(generation: GenerationConfig | None) -> int:
    return 0 if generation is None else len(generation.to_json_string().encode())


def _layer_sizes(layer: MoeLayer) -> LayerSizes:
    family, grouped = layer.family, is_grouped(layer)
    rows = {name: row_tensor(layer.router, name) for name in family.router_rows}
    router = [
        # The selection bias stays in fp32 whatever the model's type.
        (
            as_stored(
                f"{layer.router_name}.{name}", row, dtype=torch.float32 if name == family.selection_bias else None
            ),
            family.router_rows[name],
        )
        for name, row in rows.items()
    ]
    trained = frozenset(f"{layer.router_name}.{name}" for name, row in rows.items() if isinstance(row, nn.Parameter))
    return LayerSizes(
        name=layer.name,
        widths=expert_widths(layer.experts),
        top_k=layer_shape(layer).top_k,
        router=tuple(router),
        trained=trained,
        grouped=grouped,
        mask=f"{layer.router_name}.evicted" if grouped and family.selection_bias is None else None,
    )


def _fixed_names(model: PreTrainedModel, *, layers: Iterable[LayerSizes]) -> frozenset[str]:
    """Tensors whose size does not depend on the widths; of tied ones the name that is stored."""
    names = set(model.state_dict()) - set(model.all_tied_weights_keys)
    for layer in layers:
        names -= {tensor.name for tensor, _ in layer.router}
        names -= {name for name in names if name.startswith(f"{layer.name}.")}
    return frozenset(names)


def _fixed_tensors(
    model: PreTrainedModel, *, names: frozenset[str], packed: frozenset[str], stored_dtype: torch.dtype | None
) -> tuple[StoredTensor, ...]:
    """What is stored beside experts and the rows of routers."""
    modules = model.named_modules()
    matrices = {f"{name}.weight" for name, module in modules if isinstance(module, nn.Linear | nn.Embedding)}
    found: list[StoredTensor] = []
    for name, tensor in model.state_dict().items():
        if name.endswith(".weight") and name.removesuffix(".weight") in packed:
            found += packed_linear_tensors(name, shape=tensor.shape, dtype=tensor.dtype)
        elif name in names:
            found.append(as_stored(name, tensor, dtype=stored_dtype if name in matrices else None))
    return tuple(found)


def _resized(tensor: StoredTensor, *, dim: int, size: int) -> StoredTensor:
    shape = tuple(size if index == dim else own for index, own in enumerate(tensor.shape))
    return StoredTensor(name=tensor.name, dtype=tensor.dtype, shape=shape)
