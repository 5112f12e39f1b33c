"""Load a stock checkpoint part by part, into a model that takes no memory before.

E experts of a layer, C channels of all of them, H hidden.

transformers decides what the model consists of (`from_pretrained` on the meta device) and how stored tensors become its
own (its conversion mapping), so what is loaded here equals what `from_pretrained` loads, bit for bit.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import dot_natural_key

from lightning_moe.models.channel_experts import PROJECTIONS, DenseRows
from lightning_moe.models.checkpoint_checks import (
    check_complete,
    check_layers,
    check_parts,
    files_by_name,
    keys_by_name,
    stored_keys,
)
from lightning_moe.models.conversion import stock_rows, without_rows
from lightning_moe.models.discovery import MoeLayer
from lightning_moe.models.folders import LayerFolder, silent_transformers
from lightning_moe.models.fp8 import dequantised, is_fp8, without_quantization
from lightning_moe.models.loading import (
    DtypeName,
    config_errors,
    generation_config_of,
    is_stock,
    joining_errors,
    read_config,
    torch_dtype,
)
from lightning_moe.models.sources import clear_errors, open_source
from lightning_moe.models.stored_tensors import LazyTensor

_FUSED = ("gate_up_proj", "down_proj")
# Experts are read and converted in this many parts of a layer: transformers takes some three times a part for it.
_PARTS = 32


class StockFolder(LayerFolder):
    """A stock checkpoint in safetensors files, whole or in shards.

    Args:
        source: folder, `asset:small_moe`, or hub name.
        dtype: type of the weights; `auto` keeps the stored one.

    Raises:
        ValueError: see `load_model`; or the source is cut or quantised already, or not stored in safetensors.
    """

    def __init__(self, source: str, *, dtype: DtypeName = "auto") -> None:
        config = read_config(source)
        if not is_stock(source, config=config):
            raise ValueError(
                f"'{source}' cannot be read part by part as a stock model: it is cut or quantised already, or has "
                "adapters. Load it whole with `load_model`."
            )
        tensors, digest = open_source(source)
        if is_fp8(config):
            tensors = dequantised(tensors, config=config, type_name="F32" if dtype == "float32" else "BF16")
            config = without_quantization(config)
        model = meta_model(source, config=config, tensors=tensors, dtype=dtype)
        super().__init__(
            source=source,
            dtype=dtype,
            model=model,
            tensors=tensors,
            conversions=get_model_conversion_mapping(model),
            fingerprint=digest,
        )

    def _load_experts(self, layer: MoeLayer) -> None:
        stock = layer.experts
        converted = without_rows(stock)
        num_experts, hidden_size, width = stock.get_parameter("down_proj").shape
        dtype = stock.get_parameter("down_proj").dtype
        for name in PROJECTIONS:
            setattr(converted, name, DenseRows(torch.empty(num_experts * width, hidden_size, dtype=dtype)))
        for first, last in self.expert_chunks(layer, size=-(-num_experts // _PARTS)):
            self.load_experts(layer, first=first, last=last)
            for name, rows_EnH in zip(PROJECTIONS, stock_rows(stock), strict=True):
                rows_CH = converted.projection(name).get_parameter("weight").data[first * width : last * width]
                rows_CH.view_as(rows_EnH).copy_(rows_EnH)
        layer.block.set_submodule(layer.family.experts, converted)

    def expert_chunks(self, layer: MoeLayer, *, size: int) -> list[tuple[int, int]]:
        """Ranges of at most `size` experts for `load_experts`; one of all where they are stored in an unknown way."""
        num_experts = self._num_experts(layer)
        stored = [keys for name in _FUSED for keys in self._keys[f"{layer.name}.{name}"].values()]
        in_parts = (len(keys) == num_experts or self._tensors[keys[0]].shape[0] == num_experts for keys in stored)
        size = size if all(in_parts) else num_experts
        return [(first, min(first + size, num_experts)) for first in range(0, num_experts, size)]

    def load_experts(self, layer: MoeLayer, *, first: int, last: int) -> None:
        """Loads the experts `first` to `last - 1` of a layer: its stock experts module then holds these alone.

        Raises:
            ValueError: a weight cannot be read.
        """
        parts: dict[str, Any] = {}
        for name in _FUSED:
            stock = layer.experts.get_parameter(name)
            empty = torch.empty(last - first, *stock.shape[1:], dtype=stock.dtype, device="meta")
            layer.experts.register_parameter(name, nn.Parameter(empty, requires_grad=False))
            for keys in self._keys[f"{layer.name}.{name}"].values():
                if last - first == self._num_experts(layer):
                    parts |= {key: self._part(key) for key in keys}
                elif len(keys) == 1:  # all experts in one tensor
                    parts[keys[0]] = self._part(keys[0], first=first, last=last)
                else:
                    parts |= {key: self._part(key) for key in sorted(keys, key=dot_natural_key)[first:last]}
        self._read(parts)

    def _num_experts(self, layer: MoeLayer) -> int:
        return int(getattr(self.model.config.get_text_config(), layer.family.expert_count))


def meta_model(
    source: str, *, config: PretrainedConfig, tensors: Mapping[str, LazyTensor], dtype: DtypeName, quantizer: Any = None
) -> PreTrainedModel:
    """What `from_pretrained` makes of tensors of the stored names, shapes and types that have no content.

    Args:
        source: named in messages.
        config: the model's.
        tensors: what the files hold.
        dtype: type of the weights; `auto` keeps the stored one.
        quantizer: transformers' quantizer of the folder, if it has one.

    Returns:
        The model on the meta device, in eval mode.

    Raises:
        ValueError: a weight is missing or of another shape.
    """
    check_layers(config.get_text_config().num_hidden_layers, tensors=tensors, source=source)
    with torch.device("meta"), clear_errors(source):
        with config_errors(source):
            skeleton = AutoModelForCausalLM.from_config(config)
        if quantizer is not None:
            files = sorted({str(tensor.file) for tensor in tensors.values()})
            quantizer.preprocess_model(skeleton, checkpoint_files=files)
    conversions = get_model_conversion_mapping(skeleton, hf_quantizer=quantizer)
    keys, state = keys_by_name(skeleton, keys=tensors, conversions=conversions), skeleton.state_dict()
    known = [key for name in keys if name in state for key in stored_keys(keys, name)]
    if quantizer is None:
        check_parts(keys, tensors=tensors)
    else:  # without the statistics beside packed weights, which cannot be read yet
        known = [key for key in known if key in state]
    empty = {key: torch.empty(tensors[key].shape, dtype=tensors[key].dtype, device="meta") for key in known}
    with clear_errors(source), silent_transformers(), joining_errors(config, tensors=tensors):
        loaded: Any = type(skeleton).from_pretrained(
            None,
            config=config,
            state_dict=empty,
            device_map="meta",
            dtype=torch_dtype(dtype),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    model, report = loaded
    check_complete(report, source=source, files=files_by_name(keys, tensors=tensors))
    model.config.name_or_path = config.name_or_path
    model.generation_config = generation_config_of(source)
    return model
