"""Each export format: written, loaded again, compared."""

import copy
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from lightning_moe.adapters.merge import merge_adapters
from lightning_moe.adapters.storage import AdapterDtype, load_adapter, save_adapter
from lightning_moe.export.comparing import Comparison, Probe, check_stock_classes, check_tensors
from lightning_moe.export.formats import STOCK_FORMATS, ExportFormat
from lightning_moe.export.huggingface import save_ragged
from lightning_moe.export.padded import export_padded
from lightning_moe.export.place import check_room
from lightning_moe.export.result import ExportResult
from lightning_moe.export.stock_config import add_older_fields
from lightning_moe.export.stock_keys import check_stock_keys, set_engine_fields
from lightning_moe.export.stock_layouts import NOT_NATIVE
from lightning_moe.export.uniform import check_bytes, check_smaller
from lightning_moe.files import folder_bytes, write_atomically
from lightning_moe.models.channel_experts import ChannelExperts
from lightning_moe.models.discovery import moe_layers
from lightning_moe.models.loading import load_model
from lightning_moe.progress import quiet_transformers
from lightning_moe.quantization.added_error import quantize_measured
from lightning_moe.quantization.linears import quantize_model
from lightning_moe.quantization.unpacked import is_packed, unpack_model
from lightning_moe.surgery.cut import convert_experts


@contextmanager
def adapters_detached(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The base model inside the block: every adapter layer is replaced by its base layer, and put back afterwards."""
    adapters: dict[str, tuple[nn.Module, nn.Module]] = {}  # by name: the layer and its base
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and isinstance(module, nn.Module):
            adapters[name] = (module, module.get_base_layer())
        elif isinstance(module, ModulesToSaveWrapper):  # a norm and its trained copy
            adapters[name] = (module, module.original_module)
    for name, (_, base) in adapters.items():
        model.set_submodule(name, base)
    try:
        yield model
    finally:
        for name, (module, _) in adapters.items():
            model.set_submodule(name, module)


@dataclass(frozen=True, kw_only=True, eq=False)
class Writer:
    """One model on its way to disk.

    Args:
        model: the cut model (for `stock`, an uncut one).
        peft_model: what injected its adapters, if it has any.
        adapter_dtype: type of a stored adapter.
        stored: type of unpacked matrices in the files.
    """

    model: PreTrainedModel
    peft_model: PeftModel | None
    adapter_dtype: AdapterDtype
    stored: torch.dtype

    def write(self, format: ExportFormat, *, target: Path) -> tuple[ExportResult, PreTrainedModel]:
        """Writes, reloads and compares one format in the folder `target`: the result and the reloaded model.

        Raises:
            ValueError: the model does not fit the format, or the disk does not take it.
            NotReproducedError: the reload is not the model.
        """
        match format:
            case "adapter":
                return self._adapter(target, adapter_dtype=self.adapter_dtype, stored=self.stored)
            case "merged" | "merged_nf4":
                return self._merged(target, format)
            case "stock":
                return self._stock(target)
            case _:
                return self._plain(target, format)

    def _adapter(
        self, target: Path, *, adapter_dtype: AdapterDtype, stored: torch.dtype
    ) -> tuple[ExportResult, PreTrainedModel]:
        """`base/` and `adapter/`: the packed or 16-bit model and its PEFT adapter."""
        assert self.peft_model is not None
        before = Probe.of(self.model)
        save_adapter(self.peft_model, folder=target / "adapter", dtype=adapter_dtype)
        with adapters_detached(self.model):
            _save(self.model, target / "base", dtype=stored)
        reloaded = self._reload(target / "base")
        load_adapter(reloaded, folder=target / "adapter")
        check_tensors(target, expected=self.model, found=reloaded)
        rounded = adapter_dtype != "float32" or self._rounds(stored)
        return _compared("adapter", target / "base", before, reloaded, adapter=target / "adapter", rounded=rounded)

    def _merged(self, target: Path, format: ExportFormat) -> tuple[ExportResult, PreTrainedModel]:
        """Adapters merged into a reloaded copy, so that the model in training stays as it is."""
        scratch = target.with_name("tmp")
        exported, _ = self._adapter(scratch, adapter_dtype="float32", stored=self.model.dtype)
        base = self._reload(Path(exported.base))
        merged = merge_adapters(load_adapter(base, folder=str(exported.adapter)), dtype=base.dtype)
        shutil.rmtree(scratch)
        before, added_error = Probe.of(self.model), None
        if format == "merged_nf4":
            added_error = quantize_measured(merged)
            before = Probe.of(merged)
        _save(merged, target, dtype=self.stored)
        # Merging in 16 bit rounds by itself.
        rounded = self._rounds(self.stored) or (format == "merged" and merged.dtype.itemsize < 4)
        reloaded = self._reload(target)
        check_tensors(target, expected=merged, found=reloaded)
        result, reloaded = _compared(format, target, before, reloaded, rounded=rounded)
        return replace(result, added_error=added_error), reloaded

    def _plain(self, target: Path, format: ExportFormat) -> tuple[ExportResult, PreTrainedModel]:
        """The model without adapters: ragged, packed, or in the stock layout."""
        notes: tuple[str, ...] = ()
        with adapters_detached(self.model):
            convert_experts(self.model)
            if format == "uniform" or format == "expert_dropped":
                notes = check_smaller(self.model, format=format)
            model = self._in_bits(format)
            before = Probe.of(model)
            if format in STOCK_FORMATS:
                export_padded(model, target, dtype=self.stored)
            else:
                _save(model, target, dtype=self.stored)
            reloaded = self._reload(target)
            if format == "uniform" or format == "expert_dropped":
                check_bytes(target, model=self.model)
            if format not in STOCK_FORMATS:
                check_tensors(target, expected=model, found=reloaded)
        return _compared(format, target, before, reloaded, rounded=self._rounds(self.stored), notes=notes)

    def _in_bits(self, format: ExportFormat) -> PreTrainedModel:
        """The model as `nf4` and `ragged` promise it: packed in place; a copy in 16 or 32 bit of one that is packed."""
        if format == "nf4":
            quantize_model(self.model)
        if format != "ragged" or not is_packed(self.model):
            return self.model
        unpacked = copy.deepcopy(self.model)
        unpack_model(unpacked, dtype=self.model.dtype)
        return unpacked

    def _stock(self, target: Path) -> tuple[ExportResult, PreTrainedModel]:
        """An uncut model in transformers' own layout (after pretraining, say); the cast copy costs its size once."""
        cut = [layer.name for layer in moe_layers(self.model) if isinstance(layer.base_experts, ChannelExperts)]
        if cut:
            raise ValueError(
                f"'{cut[0]}' is cut or converted, and export format 'stock' is for uncut models. Use `uniform` or "
                "`expert_dropped` for a smaller stock checkpoint, `padded` otherwise, or put `stock` first."
            )
        before = Probe.of(self.model)
        check_room(target, model=self.model, dtype=self.stored)
        with write_atomically(target) as temporary, quiet_transformers():
            stored = copy.deepcopy(self.model).to(self.stored)  # pyright: ignore
            set_engine_fields(stored.config.get_text_config())
            stored.save_pretrained(temporary)
            add_older_fields(temporary)
        return _compared("stock", target, before, self._reload(target), rounded=self._rounds(self.stored))

    def _reload(self, folder: Path) -> PreTrainedModel:
        return load_model(str(folder), dtype=str(self.model.dtype).removeprefix("torch."))  # pyright: ignore

    def _rounds(self, stored: torch.dtype) -> bool:
        """Whether storing loses digits."""
        return stored.itemsize < self.model.dtype.itemsize


def _save(model: PreTrainedModel, folder: Path, *, dtype: torch.dtype) -> None:
    """`save_ragged`, where there is room for it."""
    check_room(folder, model=model, dtype=dtype)
    save_ragged(model, folder, dtype=dtype)


def _compared(
    format: ExportFormat,
    base: Path,
    before: Probe,
    reloaded: PreTrainedModel,
    *,
    rounded: bool,
    adapter: Path | None = None,
    notes: tuple[str, ...] = (),
) -> tuple[ExportResult, PreTrainedModel]:
    """The result of an export whose reload gives the same logits, and which engines can find their way in it.

    Raises:
        NotReproducedError: it does not, see `Comparison.check`; or a stock export has other tensors than engines look
            for, or needs this package.
    """
    comparison, engines = Comparison.of(before, Probe.of(reloaded)), ()
    comparison.check(base, before=before, rounded=rounded)
    if format in STOCK_FORMATS:
        config = reloaded.config.get_text_config()
        engines, limits = check_stock_keys(base, config=config)
        notes = (*notes, *limits)
        if config.model_type in NOT_NATIVE:
            notes = (*notes, NOT_NATIVE[config.model_type])
        else:
            check_stock_classes(base, reloaded)
    result = ExportResult(
        format=format,
        base=str(base),
        adapter=str(adapter) if adapter else None,
        bytes=folder_bytes(base) + (folder_bytes(adapter) if adapter else 0),
        max_logit_diff=comparison.max_logit_diff,
        median_logit_diff=comparison.median_logit_diff,
        rerouted=comparison.rerouted,
        engines=engines,
        notes=notes,
    )
    return result, reloaded
