"""A pruned folder under FSDP2: each process reads it layer by layer, and keeps its share of each layer.

Every tensor is a memory map of its own: pages that several processes of a node read are in its memory once, and those
of a layer leave a process when its share has been copied.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import cast_adapter_dtype
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_moe.export.folders import RaggedFolder
from lightning_moe.models.channel_experts import ChannelExperts, RowStorage
from lightning_moe.models.folders import compute_buffers
from lightning_moe.models.fp8 import quantization_of
from lightning_moe.models.loading import DtypeName, read_config
from lightning_moe.models.saving import QUANT_METHOD, save_with_widths
from lightning_moe.models.sources import open_source, weight_files
from lightning_moe.quantization.nf4 import PackedRows
from lightning_moe.training.mapped_tensors import map_tensor


def is_pruned_folder(source: str) -> bool:
    """Whether a source is a ragged or an NF4 folder of ours, stored in safetensors.

    Raises:
        ValueError: see `read_config` and `weight_files`.
    """
    return quantization_of(read_config(source)).get("quant_method") == QUANT_METHOD and bool(weight_files(source))


class RankLoader:
    """The model of a pruned folder whose expert rows stay on the meta device until their layer is filled.

    The rest of `model` is there, as maps of the files. Pack it and put adapters on it as on any model, inside
    `drawn_later`; then `fill` each decoder layer right before it is sharded.

    Args:
        source: a ragged or NF4 folder.
        dtype: type of the weights that are not packed; `auto` keeps the stored one.

    Raises:
        ValueError: a file is damaged, or is not of the model in `config.json`.
    """

    def __init__(self, source: str, *, dtype: DtypeName = "auto") -> None:
        self._stored, _ = open_source(source)
        self.model = RaggedFolder(source, dtype=dtype).model
        save_with_widths(self.model)
        self._fill_around_experts()
        self._names = {module: name for name, module in self.model.named_modules()}

    def fill(self, layer: nn.Module) -> None:
        """Puts the rows of a decoder layer in place, whole, and draws its adapters as on a model that is all there.

        Rows are packed where the folder has them in 16 bit and the model in 4. The layers have to be filled in the
        order of the decoder: the random numbers of the adapters are drawn in this order.

        Raises:
            ValueError: rows that are to be packed hold NaN or infinity, or a file was changed since it was opened.
        """
        for module in list(layer.modules()):
            if isinstance(module, ChannelExperts):
                self._fill_experts(module, name=self._names[module])
        for module in list(layer.modules()):
            if isinstance(module, LoraLayer) and isinstance(module, nn.Module):
                _draw_adapters(module, model=self.model)

    def _fill_experts(self, experts: ChannelExperts, *, name: str) -> None:
        for projection, storage in list(experts.named_children()):
            if isinstance(storage, RowStorage):
                setattr(experts, projection, self._rows(storage, name=f"{name}.{projection}"))
        self._fill_own(experts, prefix=f"{name}.")

    def _rows(self, storage: RowStorage, *, name: str) -> RowStorage:
        """The rows of one projection in the form of `storage`."""
        if isinstance(storage, PackedRows) and f"{name}.weight" in self._stored:
            return PackedRows.pack(self._tensor(f"{name}.weight", dtype=self.model.dtype))
        self._fill_own(storage, prefix=f"{name}.")
        return storage

    def _fill_around_experts(self) -> None:
        """Everything but expert rows: maps of the files, and the buffers that no file holds."""
        model = self.model
        experts = [module for module in model.modules() if isinstance(module, ChannelExperts)]
        inside = {module for layer in experts for module in layer.modules()}
        for name, module in model.named_modules():
            if isinstance(module, Linear4bit):
                self._fill_packed(module, name=name)
            if module not in inside:
                self._fill_own(module, prefix=f"{name}." if name else "")
        tied = model.all_tied_weights_keys
        model.tie_weights(missing_keys={*tied, *tied.values()} - set(self._stored), recompute_mapping=False)
        compute_buffers(model)

    def _fill_own(self, module: nn.Module, *, prefix: str) -> None:
        """The parameters and buffers of one module that are on the meta device and in the files."""
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta and f"{prefix}{name}" in self._stored:
                value = self._tensor(f"{prefix}{name}", dtype=parameter.dtype)
                module.register_parameter(name, nn.Parameter(value, requires_grad=parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta and f"{prefix}{name}" in self._stored:
                module.register_buffer(name, self._tensor(f"{prefix}{name}", dtype=buffer.dtype).clone())

    def _fill_packed(self, linear: Linear4bit, *, name: str) -> None:
        own = f"{name}.weight."
        statistics = {key.removeprefix(own): self._tensor(key) for key in self._stored if key.startswith(own)}
        linear.weight = Params4bit.from_prequantized(
            data=self._tensor(f"{name}.weight"), quantized_stats=statistics, device="cpu", module=linear
        )

    def _tensor(self, key: str, *, dtype: torch.dtype | None = None) -> Tensor:
        mapped = map_tensor(self._stored[key])
        return mapped if dtype is None else mapped.to(dtype)


@contextmanager
def drawn_later(model: nn.Module) -> Iterator[None]:
    """Inside, adapters are put on `model`. Where its rows wait on the meta device, no random number is used up now."""
    waits = any(parameter.is_meta for parameter in model.parameters())
    with torch.random.fork_rng(devices=[]) if waits else nullcontext():
        yield


def _draw_adapters(layer: LoraLayer, *, model: PreTrainedModel) -> None:
    """Makes the parameters of a layer's adapters anew, now that its weights are there."""
    configs: Mapping[str, LoraConfig] = vars(model)["peft_config"]
    for name, rank in list(layer.r.items()):
        layer.update_layer(name, rank, lora_alpha=layer.lora_alpha[name], config=configs[name])
        cast_adapter_dtype(layer, name)  # pyright: ignore[reportArgumentType]: a LoraLayer is a module
