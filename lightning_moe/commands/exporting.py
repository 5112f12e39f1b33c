"""The command `export`."""

import logging
from pathlib import Path

from lightning_moe.adapters.storage import load_adapter
from lightning_moe.commands._shared import tokenizer_beside
from lightning_moe.export.deploy import ExportFormat, check_formats, check_targets, export_model
from lightning_moe.files import write_json
from lightning_moe.models.loading import DtypeName, can_stream, load_model
from lightning_moe.surgery.cut import convert_experts
from lightning_moe.surgery.streaming import quantize_folder

log = logging.getLogger(__name__)


def export(
    *, model: str, out: str, formats: list[ExportFormat], adapter: str | None = None, dtype: DtypeName = "auto"
) -> None:
    """Write a pruned folder in other formats; each is reloaded and its logits compared.

    `[nf4]` alone packs a stock model layer by layer: memory for the packed model and one layer is enough.

    Args:
        model: A pruned folder (or the dense model, to convert it).
        out: Folder of the exports, one subfolder each.
        formats: `adapter`, `merged`, `merged_nf4` (all of a model and its adapter), `ragged` and `padded` (16 bit),
            `stock` (an uncut model), `nf4` (packed; stands last).
        adapter: Folder of the PEFT adapter of that model, for the first three.
        dtype: Type of the unpacked weights.
    """
    check_targets(out, formats=check_formats(formats))
    stream = can_stream(model) and list(formats) == ["nf4"] and adapter is None
    tokenizer = tokenizer_beside(model)
    loaded = quantize_folder(model, dtype=dtype) if stream else load_model(model, dtype=dtype)
    peft_model = None
    if adapter is not None:
        convert_experts(loaded)
        peft_model = load_adapter(loaded, folder=adapter)
    results = export_model(loaded, folder=out, formats=formats, peft_model=peft_model, tokenizer=tokenizer)
    write_json(Path(out) / "exports.json", [result.to_dict() for result in results])
    for result in results:
        log.info("%s: %s", result.format, result.describe())
