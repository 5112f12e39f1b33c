"""A checkpoint whose model is loaded part by part: the weights take no memory before, and give it back after."""

import copy
import ctypes
import math
import os
import platform
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from lightning_moe.models.checkpoint_checks import (
    check_tied,
    check_types,
    dropped_keys,
    keys_by_name,
    stored_keys,
    warn_of_dropped,
)
from lightning_moe.models.discovery import MoeLayer, decoder_names, moe_layers
from lightning_moe.models.loading import DtypeName
from lightning_moe.models.sources import clear_errors
from lightning_moe.models.stored_tensors import LazyTensor, Part

# transformers' own switch: it reads in four threads without it.
_NO_THREADS = "HF_DEACTIVATE_ASYNC_LOAD"


class LayerFolder(ABC):
    """A checkpoint and its model, whose weights stay on the meta device until they are loaded.

    Walk over `decoder_names`: `load_decoder`, use or change the layer, `release` it.

    Args:
        source: what the user named.
        dtype: type of the weights; `auto` keeps the stored one.
        model: the model on the meta device, in eval mode.
        tensors: what the files hold, by name.
        conversions: how transformers makes the model's weights of them.
        quantizer: transformers' quantizer of the folder, if it has one.
        fingerprint: SHA-256 over the config and the headers of the files: tells one checkpoint from another.

    Attributes:
        dropped: names of stored tensors that are no part of the model.
    """

    def __init__(
        self,
        *,
        source: str,
        dtype: DtypeName,
        model: PreTrainedModel,
        tensors: Mapping[str, LazyTensor],
        conversions: Sequence[Any],
        quantizer: Any = None,
        fingerprint: str,
    ) -> None:
        self.source, self.dtype, self.model, self.fingerprint = source, dtype, model, fingerprint
        self._tensors, self._conversions, self._quantizer = tensors, list(conversions), quantizer
        keys = keys_by_name(model, keys=tensors, conversions=conversions)
        self._blank = _copy(model, configs_of=model)
        names = self._blank.state_dict()
        self._keys = {name: keys[name] for name in keys if name in names}
        self._targets = {key: names[name].dtype for name in self._keys for key in stored_keys(self._keys, name)}
        biases = (f"{layer.router_name}.{layer.family.selection_bias}" for layer in moe_layers(model))
        self._masked = {key for bias in biases for key in stored_keys(self._keys, bias)}
        check_types(self._keys, tensors=tensors, state=names)
        check_tied(self._keys, tensors=tensors, tied=model.all_tied_weights_keys)
        self.dropped = dropped_keys(keys, names=names)
        warn_of_dropped(self.dropped, source=source)

    @property
    def decoder_names(self) -> list[str]:
        """Full names of the decoder layers, dense ones included, first layer first."""
        return decoder_names(self._blank)

    def load(self, module_name: str) -> None:
        """Loads the weights below a module that are still on the meta device ("" is the whole model).

        Raises:
            ValueError: a weight cannot be read, is NaN or infinite, or the folder was changed since it was opened.
        """
        names = [
            name for name, tensor in self.model.state_dict().items() if tensor.is_meta and below(module_name, name)
        ]
        names += [other for name in names for other in self._tied_to(name) if other not in names]
        self._read({key: self._part(key) for name in names for key in stored_keys(self._keys, name)})
        self._share_tied()

    def load_decoder(self, name: str) -> None:
        """Loads a decoder layer; its experts come as ChannelExperts.

        The memory is never more than that of the layer and an eighth of its experts.

        Args:
            name: one of `decoder_names`.

        Raises:
            ValueError: see `load`.
        """
        for layer in moe_layers(self.model):
            if layer.block_name.rpartition(".")[0] == name:
                self._load_experts(layer)
        self.load(name)
        compute_buffers(self.model, module_name=name)

    @abstractmethod
    def _load_experts(self, layer: MoeLayer) -> None:
        """Loads the experts of a layer, as ChannelExperts, in parts."""

    def release(self, module_name: str) -> None:
        """Gives back the memory of a module, whatever became of it: as it was before anything was loaded."""
        blank, module = self._blank.get_submodule(module_name), self.model.get_submodule(module_name)
        fresh = _copy(blank, configs_of=self._blank)
        if type(module) is type(fresh):  # the same object, for those who hold it
            vars(module).clear()
            vars(module).update(vars(fresh))
        else:
            self.model.set_submodule(module_name, fresh)
        for name in list(self._blank.state_dict()):
            if below(module_name, name):
                for other in self._tied_to(name):
                    _set_parameter(self.model, other, self.model.get_parameter(name))
        _give_back()

    def compute_buffers(self) -> None:
        """Computes on the CPU the buffers that no checkpoint holds (those of rotary embeddings)."""
        compute_buffers(self.model)

    def finish(self) -> PreTrainedModel:
        """Loads what is left, ties shared weights and computes the buffers that no checkpoint holds.

        Returns:
            The model, in eval mode.

        Raises:
            ValueError: see `load`.
        """
        self.load("")
        self.compute_buffers()
        return self.model

    def decoder_bytes(self, name: str) -> int:
        """Bytes of a decoder layer as `load_decoder` leaves it in memory, from the headers alone."""
        keys = [key for own in self._keys if below(name, own) for key in stored_keys(self._keys, own)]
        return sum(math.prod(self._tensors[key].shape) * self._dtype_of(key).itemsize for key in keys)

    def _dtype_of(self, key: str) -> torch.dtype:
        """Type of a stored tensor in memory: that of the model's weight, and for packed ones the stored type."""
        stored, target = self._tensors[key].dtype, self._targets[key]
        return target if stored.is_floating_point and target.is_floating_point else stored

    def _part(self, key: str, *, first: int = 0, last: int | None = None) -> Part:
        dtype, masks = self._dtype_of(key), key in self._masked
        return Part(tensor=self._tensors[key], dtype=dtype, first=first, last=last, masks=masks)

    def _read(self, parts: Mapping[str, Part]) -> None:
        settings = LoadStateDictConfig(
            dtype=self.model.dtype, weight_mapping=self._conversions, hf_quantizer=self._quantizer
        )
        if parts:
            with clear_errors(self.source), silent_transformers(), _one_thread():
                report, _ = convert_and_load_state_dict_in_model(self.model, dict(parts), settings)
            bad = {*report.conversion_errors, *(name for name, *_ in report.mismatched_keys)}
            assert not bad, bad  # the headers alone were tried before
            _give_back()

    def _tied_to(self, name: str) -> list[str]:
        """The other names of a weight that a tied model has under several."""
        tied = self.model.all_tied_weights_keys
        groups = ({source, *(target for target in tied if tied[target] == source)} for source in set(tied.values()))
        return sorted(other for group in groups if name in group for other in group - {name})

    def _share_tied(self) -> None:
        for target, source in self.model.all_tied_weights_keys.items():
            one, other = self.model.get_parameter(target), self.model.get_parameter(source)
            value = one if other.is_meta else other
            if one is not other and not value.is_meta:
                _set_parameter(self.model, target, value)
                _set_parameter(self.model, source, value)


def compute_buffers(model: PreTrainedModel, *, module_name: str = "") -> None:
    """Fills, below a module ("" is the whole model), what no file holds: such as frequencies of rotary embeddings."""
    computed = {
        name.rpartition(".")[0]
        for name, buffer in model.named_non_persistent_buffers()
        if buffer.is_meta and below(module_name, name)
    }
    for module in map(model.get_submodule, computed):
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, torch.empty_like(buffer, device="cpu"), persistent=False)
        with torch.no_grad():
            model._init_weights(module)


def below(module_name: str, name: str) -> bool:
    """Whether a tensor of this full name belongs to a module ("" is the whole model)."""
    return not module_name or name.startswith(f"{module_name}.")


@contextmanager
def silent_transformers() -> Iterator[None]:
    """Without its bars, one for each part, and its report of missing weights, which are refused right after."""
    shown, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if shown:
            transformers_logging.enable_progress_bar()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Transformers reads one tensor after the other; its threads would read ahead and keep what they freed."""
    before = os.environ.get(_NO_THREADS)
    os.environ[_NO_THREADS] = "1"
    try:
        yield
    finally:
        os.environ.pop(_NO_THREADS)
        if before is not None:
            os.environ[_NO_THREADS] = before


def _give_back() -> None:
    """Gives what was freed back to the system; glibc keeps it where something in use lies above it."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _copy(module: Any, *, configs_of: PreTrainedModel) -> Any:
    """A deep copy that shares the configs."""
    configs = [configs_of.config, configs_of.config.get_text_config()]
    return copy.deepcopy(module, {id(config): config for config in configs})


def _set_parameter(model: nn.Module, name: str, value: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    model.get_submodule(owner).register_parameter(leaf, value)
