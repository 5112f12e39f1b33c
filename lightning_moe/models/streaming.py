"""Load a stock checkpoint part by part, into a model that takes no memory before.  E experts of a layer.

transformers decides what the model consists of (`from_pretrained` on the meta device) and how stored tensors become its
own (its conversion mapping), so what is loaded here equals what `from_pretrained` loads, bit for bit.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig, str_to_torch_dtype
from transformers.utils import logging as transformers_logging

from lightning_moe.files import read_shapes
from lightning_moe.models.discovery import MoeLayer, expert_widths, moe_layers
from lightning_moe.models.loading import (
    DtypeName,
    can_stream,
    check_complete,
    clear_errors,
    find_file,
    read_config,
    torch_dtype,
    weight_files,
)

_FUSED = ("gate_up_proj", "down_proj")


class StockFolder:
    """A stock checkpoint and its model, whose weights stay on the meta device until they are loaded.

    Walk over `decoder_names`: `load` what is below a name (experts also in parts), use or replace it; then `finish`.

    Args:
        source: folder, `asset:small_moe`, or hub name.
        dtype: type of the weights; `auto` keeps the stored one.

    Raises:
        ValueError: see `load_model`; or the source is cut or quantised already, or not stored in safetensors.
    """

    def __init__(self, source: str, *, dtype: DtypeName = "auto") -> None:
        if not can_stream(source):
            raise ValueError(
                f"'{source}' cannot be read part by part: it is cut or quantised already, or has no safetensors files. "
                "Load it whole with `load_model`."
            )
        self._source = source
        files = weight_files(source)
        for file in files:
            read_shapes(file, what="file of weights")
        # Plain reads: pages of a mapped file would stay in the process's memory.
        opened = [safe_open(str(file), framework="pt", backend="pread") for file in files]
        self._stored = {key: file.get_slice(key) for file in opened for key in file.keys()}  # noqa: SIM118
        self.model = _meta_model(source, stored=self._stored, dtype=dtype)
        self._conversions: list[Any] = get_model_conversion_mapping(self.model)
        self._keys = self._keys_by_name()

    @property
    def decoder_names(self) -> list[str]:
        """Full names of the decoder layers, dense ones included, first layer first."""
        decoder = moe_layers(self.model)[0].block_name.rpartition(".")[0].rpartition(".")[0]
        return [f"{decoder}.{name}" for name, _ in self.model.get_submodule(decoder).named_children()]

    def load(self, module_name: str) -> None:
        """Loads the weights below a module that are still on the meta device ("" is the whole model).

        Raises:
            ValueError: a weight is NaN or infinite, or cannot be read.
        """
        prefix = f"{module_name}." if module_name else ""
        names = [name for name, tensor in self.model.state_dict().items() if tensor.is_meta and name.startswith(prefix)]
        keys = {name: self._keys[name] for name in names if name in self._keys}  # a tied weight is stored once
        self._read(key for by_pattern in keys.values() for own in by_pattern.values() for key in own)
        self._check_finite(keys)

    def expert_chunks(self, layer: MoeLayer, *, size: int) -> list[tuple[int, int]]:
        """Ranges of at most `size` experts for `load_experts`; one of all where they are stored as one tensor."""
        num_experts = len(expert_widths(layer.experts))
        stored = [keys for name in _FUSED for keys in self._keys[f"{layer.name}.{name}"].values()]
        size = size if all(len(keys) == num_experts for keys in stored) else num_experts
        return [(first, min(first + size, num_experts)) for first in range(0, num_experts, size)]

    def load_experts(self, layer: MoeLayer, *, first: int, last: int) -> None:
        """Loads the experts `first` to `last - 1` of a layer: its stock experts module then holds these alone.

        Raises:
            ValueError: a weight is NaN or infinite, or cannot be read.
        """
        keys: list[str] = []
        for name in _FUSED:
            stock = layer.experts.get_parameter(name)
            empty = torch.empty(last - first, *stock.shape[1:], dtype=stock.dtype, device="meta")
            layer.experts.register_parameter(name, nn.Parameter(empty, requires_grad=False))
            for stored in self._keys[f"{layer.name}.{name}"].values():
                keys += stored if len(stored) == 1 else sorted(stored, key=dot_natural_key)[first:last]
        self._read(keys)
        self._check_finite(f"{layer.name}.{name}" for name in _FUSED)

    def finish(self) -> PreTrainedModel:
        """Loads what is left, ties shared weights and computes the buffers that no checkpoint holds.

        Returns:
            The model, in eval mode.

        Raises:
            ValueError: a weight is NaN or infinite, or cannot be read.
        """
        self.load("")
        tied = self.model.all_tied_weights_keys
        self.model.tie_weights(missing_keys={*tied, *tied.values()} - set(self._keys), recompute_mapping=False)
        computed = {name.rpartition(".")[0] for name, _ in self.model.named_non_persistent_buffers()}
        for module in map(self.model.get_submodule, computed):
            for name, buffer in module.named_buffers(recurse=False):
                module.register_buffer(name, torch.empty_like(buffer, device="cpu"), persistent=False)
            with torch.no_grad():
                self.model._init_weights(module)
        return self.model

    def _keys_by_name(self) -> dict[str, dict[str, list[str]]]:
        """Name of each weight of the model -> pattern of the conversion (or the key itself) -> stored keys."""
        renamings = [entry for entry in self._conversions if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._conversions if isinstance(entry, WeightConverter)]
        state, prefix = self.model.state_dict(), self.model.base_model_prefix
        keys: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        for key in self._stored:
            name, pattern = rename_source_key(key, renamings, converters, prefix, state)
            if name not in state and key in state:  # transformers' own rule for keys that should keep their name
                name, pattern = rename_source_key(key, [], [], prefix, state)
            keys[name][key if pattern is None else pattern].append(key)
        return dict(keys)

    def _read(self, keys: Iterable[str]) -> None:
        stored = {key: self._stored[key] for key in keys}
        settings = LoadStateDictConfig(dtype=self.model.dtype, weight_mapping=self._conversions)
        with clear_errors(self._source), _without_bars():
            convert_and_load_state_dict_in_model(self.model, stored, settings)

    def _check_finite(self, names: Iterable[str]) -> None:
        for name in names:
            value: Any = self.model.get_parameter_or_buffer(name)
            # One NaN makes both ends NaN; forty times as fast as asking each value.
            if value.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(value))).all()):
                raise ValueError(
                    f"'{name}' of '{self._source}' holds NaN or infinity, which 4-bit codes would hide. "
                    "Write or download the checkpoint again."
                )


def _meta_model(source: str, *, stored: Mapping[str, Any], dtype: DtypeName) -> PreTrainedModel:
    """What `from_pretrained` makes of tensors of the stored names, shapes and types that have no content."""
    config = read_config(source)
    empty = {
        key: torch.empty(part.get_shape(), dtype=str_to_torch_dtype[part.get_dtype()], device="meta")
        for key, part in stored.items()
    }
    with torch.device("meta"):
        model_class = type(AutoModelForCausalLM.from_config(config))
    with clear_errors(source), _without_bars():
        loaded: Any = model_class.from_pretrained(
            None,
            config=config,
            state_dict=empty,
            device_map="meta",
            dtype=torch_dtype(dtype),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    model, report = loaded
    check_complete(report, source=source)
    model.config.name_or_path = config.name_or_path
    generation = find_file(source, "generation_config.json")
    if generation is not None:
        model.generation_config = GenerationConfig.from_pretrained(generation.parent)
    return model


@contextmanager
def _without_bars() -> Iterator[None]:
    """Transformers would show one bar for each part."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
