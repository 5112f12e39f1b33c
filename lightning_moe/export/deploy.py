"""Exports for deployment: each is written, reloaded, and its logits compared, before it counts as done."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_moe.adapters.storage import AdapterDtype
from lightning_moe.export.apart import check_apart
from lightning_moe.export.formats import ExportFormat, check_formats, check_targets, needs_adapters
from lightning_moe.export.manifest import THROUGH_4_BIT, Manifest, write_manifest
from lightning_moe.export.model_card import Rows, carry_card, write_card
from lightning_moe.export.place import made_beside
from lightning_moe.export.result import ExportResult
from lightning_moe.export.tokenizer_files import save_tokenizer
from lightning_moe.export.uniform import is_cut
from lightning_moe.export.writers import Writer
from lightning_moe.models.loading import DtypeName
from lightning_moe.quantization.unpacked import is_packed
from lightning_moe.records import PrunePlan
from lightning_moe.renaming import make_folder


def export_model(
    model: PreTrainedModel,
    *,
    folder: str | Path,
    formats: Sequence[ExportFormat],
    peft_model: PeftModel | None = None,
    adapter_dtype: AdapterDtype = "float32",
    dtype: DtypeName = "auto",
    tokenizer: PreTrainedTokenizerBase | None = None,
    source: str | None = None,
    plans: Sequence[PrunePlan] = (),
    results: Rows = (),
) -> list[ExportResult]:
    """Writes a cut model, with or without injected adapters, in each format below `folder`.

    Each folder gets a `manifest.json` and a model card (`README.md`; one that a person wrote or edited stays). It is
    made in `NAME.unfinished` and renamed when all is there and compared.

    Args:
        model: the cut model (for `stock`, an uncut one).
        folder: where the formats go, one subfolder each.
        formats: what to write, in this order. `nf4` packs the model in place and so stands last.
        peft_model: what injected its adapters, if it has any; the formats `adapter` and `merged*` need it.
        adapter_dtype: type of the stored adapter, `float32` or `float16`.
        dtype: stored type of unpacked matrices (embeddings, say); `auto` keeps the model's.
        tokenizer: written beside each model, if given.
        source: folder, asset or hub name that the model was loaded from; as the model says if not given.
        plans: what was cut since, oldest first.
        results: rows of `evaluate` for the table in the model card.

    Returns:
        One result per format.

    Raises:
        ValueError: a format asks for adapters and there are none, `stock` for a cut model, `uniform` or
            `expert_dropped` for one that such a checkpoint does not hold, something other than a model or the source
            would be replaced, another process is writing there, the disk does not take it, or a reload does not
            reproduce the logits or has other tensors than engines look for: that one stays in `NAME.unfinished/NAME`,
            and an older export `NAME` as it was.
    """
    wanted = needs_adapters(check_formats(formats))
    if wanted and peft_model is None:
        raise ValueError(f"Export format '{wanted[0]}' needs adapters and the model has none. Use `ragged` or `nf4`.")
    check_targets(folder, formats=check_formats(formats))
    read = source or model.name_or_path or None
    for name in check_formats(formats):
        check_apart(Path(folder) / name, inputs=[read], name="folder", within=False)
    make_folder(Path(folder))
    stored = model.dtype if dtype == "auto" else getattr(torch, dtype)
    writer = Writer(model=model, peft_model=peft_model, adapter_dtype=adapter_dtype, stored=stored)
    description = _Description(
        source=read or "a model in memory",
        plans=tuple(plans),
        tokenizer=tokenizer,
        results=results,
        packed=is_packed(model),
    )
    finished, cut = list[ExportResult](), is_cut(model)
    for name in check_formats(formats):
        target = Path(folder) / name
        with made_beside(target) as made:
            result, reloaded = writer.write(name, target=made)
            kept = carry_card(target, made)
            notes = description.complete(result, reloaded, cut=cut)
        finished.append(replace(result.at(target), notes=(*notes, *kept)))
    return finished


@dataclass(frozen=True, kw_only=True, eq=False)
class _Description:
    """What lies beside the weights of each export: tokenizer, manifest, model card."""

    source: str
    plans: tuple[PrunePlan, ...]
    tokenizer: PreTrainedTokenizerBase | None
    results: Rows
    packed: bool

    def complete(self, result: ExportResult, reloaded: PreTrainedModel, *, cut: bool) -> tuple[str, ...]:
        """Writes them, the card last; what there is to know of the result."""
        if self.tokenizer is not None:
            save_tokenizer(self.tokenizer, folder=result.base)
        manifest = self._manifest(result, reloaded, folder=result.path, format=result.format)
        if result.adapter is not None:  # the base may be the source of another export
            format = "nf4" if manifest.bits["experts"] == 4 else "ragged"
            self._manifest(result, reloaded, folder=result.base, format=format)
        notes = (*result.notes, *([THROUGH_4_BIT] if manifest.through_4_bit else []))
        write_card(result.path, manifest=manifest, results=self.results, notes=notes, cut=cut)
        return notes

    def _manifest(
        self, result: ExportResult, reloaded: PreTrainedModel, *, folder: str, format: ExportFormat
    ) -> Manifest:
        return write_manifest(
            folder,
            format=format,
            source=self.source,
            model=reloaded,
            plans=self.plans,
            max_logit_diff=result.max_logit_diff,
            added_error=result.added_error,
            unpacked=self.packed,
        )
