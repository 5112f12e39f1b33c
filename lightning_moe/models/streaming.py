"""Load a stock checkpoint part by part, into a model that takes no memory before.  E experts of a layer.

transformers decides what the model consists of (`from_pretrained` on the meta device) and how stored tensors become its
own (its conversion mapping), so what is loaded here equals what `from_pretrained` loads, bit for bit.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
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
from lightning_moe.models.discovery import MoeLayer, moe_layers
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
        self.source, self.dtype = source, dtype
        files = weight_files(source)
        for file in files:
            read_shapes(file, what="file of weights")
        # Plain reads: pages of a mapped file would stay in the process's memory.
        opened = {file: safe_open(str(file), framework="pt", backend="pread") for file in files}
        self._files = {key: file for file in files for key in opened[file].keys()}  # noqa: SIM118
        self._stored = {key: opened[file].get_slice(key) for key, file in self._files.items()}
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
            ValueError: a weight cannot be read.
        """
        prefix = f"{module_name}." if module_name else ""
        names = [name for name, tensor in self.model.state_dict().items() if tensor.is_meta and name.startswith(prefix)]
        keys = {name: self._keys[name] for name in names if name in self._keys}  # a tied weight is stored once
        self._read({key: self._stored[key] for own in keys.values() for stored in own.values() for key in stored})

    def expert_chunks(self, layer: MoeLayer, *, size: int) -> list[tuple[int, int]]:
        """Ranges of at most `size` experts for `load_experts`; one of all where they are stored in an unknown way."""
        num_experts = self._num_experts(layer)
        stored = [keys for name in _FUSED for keys in self._keys[f"{layer.name}.{name}"].values()]
        in_parts = (len(keys) == num_experts or self._stored[keys[0]].get_shape()[0] == num_experts for keys in stored)
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
                    parts |= {key: self._stored[key] for key in keys}
                elif len(keys) == 1:  # all experts in one tensor
                    parts[keys[0]] = _Rows(self._files[keys[0]], keys[0], first=first, last=last)
                else:
                    parts |= {key: self._stored[key] for key in sorted(keys, key=dot_natural_key)[first:last]}
        self._read(parts)

    def _num_experts(self, layer: MoeLayer) -> int:
        return int(getattr(self.model.config.get_text_config(), layer.family.expert_count))

    def finish(self) -> PreTrainedModel:
        """Loads what is left, ties shared weights and computes the buffers that no checkpoint holds.

        Returns:
            The model, in eval mode.

        Raises:
            ValueError: a weight cannot be read.
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

    def _read(self, stored: Mapping[str, Any]) -> None:
        settings = LoadStateDictConfig(dtype=self.model.dtype, weight_mapping=self._conversions)
        with clear_errors(self.source), _without_bars():
            convert_and_load_state_dict_in_model(self.model, dict(stored), settings)


class _Rows:
    """The rows `first` to `last - 1` of a stored tensor, read when transformers asks for `[...]`.

    A plain read would take the whole tensor; a map, of which only these rows are touched, ends with the call.
    """

    def __init__(self, file: Path, key: str, *, first: int, last: int) -> None:
        self._file, self._key, self._rows = file, key, slice(first, last)

    def __getitem__(self, every: Any) -> Tensor:
        with safe_open(str(self._file), framework="pt") as mapped:
            return mapped.get_slice(self._key)[self._rows][every].clone()


def _meta_model(source: str, *, stored: Mapping[str, Any], dtype: DtypeName) -> PreTrainedModel:
    """What `from_pretrained` makes of tensors of the stored names, shapes and types that have no content."""
    config = read_config(source)
    for key, part in stored.items():
        if part.get_dtype() not in str_to_torch_dtype:
            raise ValueError(
                f"'{key}' of '{source}' is stored as {part.get_dtype()}, which transformers does not read. "
                f"It reads {', '.join(str_to_torch_dtype)}."
            )
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
    model.generation_config = _generation_config(source)
    return model


def _generation_config(source: str) -> GenerationConfig:
    """The one `from_pretrained` takes: made of the model's config where there is none or it cannot be read."""
    find_file(source, "generation_config.json")  # downloads it
    config = find_file(source, "config.json")
    assert config is not None
    try:
        return GenerationConfig.from_pretrained(config.parent)
    except OSError:
        return GenerationConfig.from_pretrained(config.parent, "config.json", _from_model_config=True)


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
