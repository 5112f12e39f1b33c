"""The command `export`."""

import logging
from collections.abc import Sequence
from pathlib import Path

from lightning_moe.adapters.storage import load_adapter
from lightning_moe.commands._shared import tokenizer_beside
from lightning_moe.evaluation.stages import load_stages
from lightning_moe.export.apart import check_apart
from lightning_moe.export.deploy import export_model
from lightning_moe.export.formats import ExportFormat, check_formats, check_targets
from lightning_moe.export.hub import check_hub_name, push_folder
from lightning_moe.export.result import ExportResult
from lightning_moe.export.streamed import export_streamed
from lightning_moe.files import write_json
from lightning_moe.models.loading import DtypeName, can_stream, load_model, read_config
from lightning_moe.surgery.cut import convert_experts

log = logging.getLogger(__name__)


def export(
    *,
    model: str,
    out: str,
    formats: list[ExportFormat],
    adapter: str | None = None,
    dtype: DtypeName = "auto",
    results: str | None = None,
    push_to_hub: str | None = None,
    private: bool = False,
) -> None:
    """Write a pruned folder in other formats; each is reloaded and its logits compared, then described and uploaded.

    Each folder gets a `manifest.json` and a model card. `[nf4]` alone packs a stock model that may be larger than
    memory, and compares it, one decoder layer at a time.

    Args:
        model: A pruned folder (or the dense model, to convert it).
        out: Folder of the exports, one subfolder each.
        formats: `adapter`, `merged`, `merged_nf4` (all of a model and its adapter); `ragged` (16 bit) and `nf4`
            (packed; stands last), which load after `import lightning_moe`; and for stock transformers and engines
            `uniform` (a model of one width), `expert_dropped` (one that lost equally many experts in each layer),
            `padded` (any widths, with zero channels; saves nothing; behind softmax routers every layer must keep as
            many experts), `stock` (an uncut one).
        adapter: Folder of the PEFT adapter of that model, for the first three.
        dtype: Type of the unpacked weights; `auto` is the stored one.
        results: Folder of results of `evaluate`, whose table goes into the model card.
        push_to_hub: Where to upload the finished export, `owner/name`; one format only.
        private: Make that repository private, if it is new.
    """
    for name in check_formats(formats):
        check_apart(Path(out) / name, inputs=[model, adapter], within=False)
    check_targets(out, formats=formats)
    _check_upload(formats, push_to_hub=push_to_hub)
    read_config(model)
    rows = [] if results is None else list(load_stages(results).values())
    tokenizer = tokenizer_beside(model)
    if list(formats) == ["nf4"] and adapter is None and can_stream(model):
        exported = [export_streamed(model, folder=out, dtype=dtype, tokenizer=tokenizer, results=rows)]
    else:
        loaded, peft_model = load_model(model, dtype=dtype), None
        if adapter is not None:
            convert_experts(loaded)
            peft_model = load_adapter(loaded, folder=adapter)
        exported = export_model(
            loaded, folder=out, formats=formats, peft_model=peft_model, tokenizer=tokenizer, source=model, results=rows
        )
    _report(exported, out=out)
    if push_to_hub is not None:
        log.info("Uploaded: %s", push_folder(exported[0].path, name=push_to_hub, private=private))


def _check_upload(formats: Sequence[ExportFormat], *, push_to_hub: str | None) -> None:
    if push_to_hub is None:
        return
    if len(formats) != 1:
        raise ValueError(f"`push_to_hub` uploads one format, got {list(formats)}. Export the others without it.")
    check_hub_name(push_to_hub)


def _report(exported: Sequence[ExportResult], *, out: str) -> None:
    write_json(Path(out) / "exports.json", [result.to_dict() for result in exported])
    for result in exported:
        log.info("%s: %s", result.format, result.describe())
