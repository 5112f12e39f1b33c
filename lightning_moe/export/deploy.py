"""Exports for deployment: each is written, reloaded, and its logits compared, before it counts as done."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_moe.adapters.merge import merge_adapters
from lightning_moe.adapters.storage import AdapterDtype, load_adapter, save_adapter
from lightning_moe.export.huggingface import check_replaceable, save_ragged
from lightning_moe.export.padded import export_padded
from lightning_moe.files import folder_bytes, write_atomically
from lightning_moe.models.channel_experts import ChannelExperts
from lightning_moe.models.discovery import moe_layers
from lightning_moe.models.loading import DtypeName, load_model
from lightning_moe.progress import quiet_transformers
from lightning_moe.quantization.linears import quantize_model
from lightning_moe.surgery.cut import convert_experts

ExportFormat = Literal["adapter", "merged", "merged_nf4", "ragged", "nf4", "padded", "stock"]


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """One finished export.

    Args:
        format: which one.
        base: folder of the model.
        adapter: folder of the adapter, for `adapter`.
        bytes: bytes of all its files.
        max_logit_diff: largest difference between the logits before and after the reload.
    """

    format: ExportFormat
    base: str
    adapter: str | None
    bytes: int
    max_logit_diff: float

    def to_dict(self) -> dict[str, Any]:
        """Plain types; `path` is the folder of the whole export."""
        return {"path": str(Path(self.base).parent) if self.adapter else self.base} | asdict(self)

    def describe(self) -> str:
        """One line."""
        size = f"{self.bytes / 1e6:.2f} MB"
        return f"{self.base}, {size}, largest logit difference after reload {self.max_logit_diff:.1e}"


def check_formats(formats: Sequence[str]) -> list[ExportFormat]:
    """The formats, validated.

    Raises:
        ValueError: none, an unknown one, or `nf4` (which packs the model in place) before another.
    """
    if not formats:
        raise ValueError(f"Name at least one export format of {', '.join(get_args(ExportFormat))}.")
    if "nf4" in formats[:-1]:
        raise ValueError(f"Export format 'nf4' packs the model in place and must be the last, got {list(formats)}.")
    unknown = [name for name in formats if name not in get_args(ExportFormat)]
    if unknown:
        raise ValueError(f"Unknown export format '{unknown[0]}'. Known: {', '.join(get_args(ExportFormat))}.")
    return list(formats)  # pyright: ignore[reportReturnType]


def check_targets(folder: str | Path, *, formats: Sequence[ExportFormat]) -> None:
    """Refuses formats whose model would replace something else below `folder`.

    Raises:
        ValueError: see `check_replaceable`.
    """
    for name in formats:
        check_replaceable(Path(folder) / name / "base" if name == "adapter" else Path(folder) / name)


def needs_adapters(formats: Sequence[ExportFormat]) -> list[ExportFormat]:
    """Those of the formats that are made of a model and its adapters."""
    return [name for name in formats if name in ("adapter", "merged", "merged_nf4")]


def export_model(
    model: PreTrainedModel,
    *,
    folder: str | Path,
    formats: Sequence[ExportFormat],
    peft_model: PeftModel | None = None,
    adapter_dtype: AdapterDtype = "float32",
    dtype: DtypeName = "auto",
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[ExportResult]:
    """Writes a cut model, with or without injected adapters, in each format below `folder`.

    Args:
        model: the cut model (for `stock`, an uncut one).
        folder: where the formats go, one subfolder each.
        formats: what to write, in this order. `nf4` packs the model in place and so stands last.
        peft_model: what injected its adapters, if it has any; the formats `adapter` and `merged*` need it.
        adapter_dtype: type of the stored adapter, `float32` or `float16`.
        dtype: stored type of unpacked matrices (embeddings, say); `auto` keeps the model's.
        tokenizer: written beside each model, if given.

    Returns:
        One result per format.

    Raises:
        ValueError: a format asks for adapters and there are none, `stock` for a cut model, something other than a
            model would be replaced, or a reload does not reproduce the logits.
    """
    wanted = needs_adapters(check_formats(formats))
    if wanted and peft_model is None:
        raise ValueError(f"Export format '{wanted[0]}' needs adapters and the model has none. Use `ragged` or `nf4`.")
    check_targets(folder, formats=check_formats(formats))
    Path(folder).mkdir(parents=True, exist_ok=True)
    stored = model.dtype if dtype == "auto" else getattr(torch, dtype)
    export = _Export(
        model=model, peft_model=peft_model, folder=Path(folder), adapter_dtype=adapter_dtype, stored=stored
    )
    results = [export.write(name) for name in check_formats(formats)]
    if tokenizer is not None:
        for result in results:
            tokenizer.save_pretrained(result.base)
    return results


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


@torch.no_grad()
def probe_logits(model: PreTrainedModel) -> Tensor:
    """Logits `[2, 32, V]` on fixed random tokens, in eval mode."""
    config = model.config.get_text_config()
    ids = torch.randint(0, int(config.vocab_size), (2, 32), generator=torch.Generator().manual_seed(0))
    was_training = model.training
    logits = model.eval()(input_ids=ids.to(model.device), use_cache=False).logits.float().cpu()
    model.train(was_training)
    return logits


@dataclass(frozen=True, kw_only=True, eq=False)
class _Export:
    """One model on its way to disk; `stored` is the type of unpacked matrices there."""

    model: PreTrainedModel
    peft_model: PeftModel | None
    folder: Path
    adapter_dtype: AdapterDtype
    stored: torch.dtype

    def write(self, format: ExportFormat) -> ExportResult:
        """Writes, reloads and compares one format."""
        target = self.folder / format
        match format:
            case "adapter":
                return self._adapter(target, adapter_dtype=self.adapter_dtype, stored=self.stored)
            case "merged" | "merged_nf4":
                return self._merged(target, format)
            case "stock":
                return self._stock(target)
            case "ragged" | "nf4" | "padded":
                return self._plain(target, format)

    def _adapter(self, target: Path, *, adapter_dtype: AdapterDtype, stored: torch.dtype) -> ExportResult:
        """`base/` and `adapter/`: the packed or 16-bit model and its PEFT adapter."""
        assert self.peft_model is not None
        before = probe_logits(self.model)
        save_adapter(self.peft_model, folder=target / "adapter", dtype=adapter_dtype)
        with adapters_detached(self.model):
            save_ragged(self.model, target / "base", dtype=stored)
        reloaded = self._reload(target / "base")
        load_adapter(reloaded, folder=target / "adapter")
        _check_tensors(target, expected=self.model, found=reloaded)
        rounded = adapter_dtype != "float32" or self._rounds(stored)
        return _compared("adapter", target / "base", before, reloaded, adapter=target / "adapter", rounded=rounded)

    def _merged(self, target: Path, format: ExportFormat) -> ExportResult:
        """Adapters merged into a reloaded copy, so that the model in training stays as it is."""
        with TemporaryDirectory(dir=self.folder) as scratch:
            exported = self._adapter(Path(scratch), adapter_dtype="float32", stored=self.model.dtype)
            base = self._reload(Path(exported.base))
            merged = merge_adapters(load_adapter(base, folder=str(exported.adapter)), dtype=base.dtype)
        before = probe_logits(self.model)
        if format == "merged_nf4":
            quantize_model(merged)
            before = probe_logits(merged)
        save_ragged(merged, target, dtype=self.stored)
        # Merging in 16 bit rounds by itself.
        rounded = self._rounds(self.stored) or (format == "merged" and merged.dtype.itemsize < 4)
        reloaded = self._reload(target)
        _check_tensors(target, expected=merged, found=reloaded)
        return _compared(format, target, before, reloaded, rounded=rounded)

    def _plain(self, target: Path, format: ExportFormat) -> ExportResult:
        """The model without adapters: ragged, packed, or zero-padded in the stock layout."""
        with adapters_detached(self.model):
            convert_experts(self.model)
            if format == "nf4":
                quantize_model(self.model)
            before = probe_logits(self.model)
            if format == "padded":
                export_padded(self.model, target)
            else:
                save_ragged(self.model, target, dtype=self.stored)
            reloaded = self._reload(target)
            if format != "padded":
                _check_tensors(target, expected=self.model, found=reloaded)
        return _compared(format, target, before, reloaded, rounded=self._rounds(self.stored))

    def _stock(self, target: Path) -> ExportResult:
        """An uncut model in transformers' own layout (after pretraining, say); the cast copy costs its size once."""
        cut = [layer.name for layer in moe_layers(self.model) if isinstance(layer.base_experts, ChannelExperts)]
        if cut:
            raise ValueError(
                f"'{cut[0]}' is cut or converted, and export format 'stock' is for uncut models. Use `padded`, or put "
                "`stock` first."
            )
        before = probe_logits(self.model)
        with write_atomically(target) as temporary, quiet_transformers():
            copy.deepcopy(self.model).to(self.stored).save_pretrained(temporary)  # pyright: ignore
        return _compared("stock", target, before, self._reload(target), rounded=self._rounds(self.stored))

    def _reload(self, folder: Path) -> PreTrainedModel:
        return load_model(str(folder), dtype=str(self.model.dtype).removeprefix("torch."))  # pyright: ignore

    def _rounds(self, stored: torch.dtype) -> bool:
        """Whether storing loses digits."""
        return stored.itemsize < self.model.dtype.itemsize


def _check_tensors(base: Path, *, expected: PreTrainedModel, found: PreTrainedModel) -> None:
    """Every tensor of the reload is the one that was saved, up to the rounding of its stored type.

    Raises:
        ValueError: one is missing or differs; the message names it.
    """
    saved, reloaded = (dict(model.named_parameters()) | dict(model.named_buffers()) for model in (expected, found))
    for name in sorted(saved.keys() | reloaded.keys()):
        if name not in saved or name not in reloaded or not _equal_up_to_rounding(saved[name], reloaded[name]):
            raise ValueError(
                f"The export '{base}' does not reproduce the model: '{name}' differs after the reload. It is left "
                "there for inspection; do not ship it."
            )


def _equal_up_to_rounding(saved: Tensor, reloaded: Tensor) -> bool:
    """bfloat16 keeps 8 bits, float16 11 bits down to 6e-8; packed codes must be equal."""
    saved, reloaded = saved.detach().cpu(), reloaded.detach().cpu()
    if saved.shape != reloaded.shape or not saved.is_floating_point():
        return torch.equal(saved, reloaded)
    return torch.allclose(saved.float(), reloaded.float(), rtol=2**-7, atol=1e-6, equal_nan=True)


def _compared(
    format: ExportFormat,
    base: Path,
    before: Tensor,
    reloaded: PreTrainedModel,
    *,
    rounded: bool,
    adapter: Path | None = None,
) -> ExportResult:
    """The result of an export whose reload gives the same logits.

    Where storing rounds, a token whose routing was close may be sent to another expert and differ by more than the
    rounding itself: then the median token decides, and otherwise the worst one.

    Raises:
        ValueError: it does not; the tolerance is relative to the largest logit.
    """
    difference_BS = (probe_logits(reloaded) - before).abs().amax(-1)
    judged = float(difference_BS.median() if rounded else difference_BS.max())
    allowed = float(before.abs().max()) * (5e-2 if rounded else 1e-3)
    if not judged <= allowed:
        raise ValueError(
            f"The export '{base}' does not reproduce the model: logits differ by {judged:.3g}, allowed "
            f"{allowed:.3g}. It is left there for inspection; do not ship it."
        )
    return ExportResult(
        format=format,
        base=str(base),
        adapter=str(adapter) if adapter else None,
        bytes=folder_bytes(base) + (folder_bytes(adapter) if adapter else 0),
        max_logit_diff=float(difference_BS.max()),
    )
