"""The command `evaluate`."""

import logging
from pathlib import Path

from lightning_moe.assets import resolve_asset
from lightning_moe.commands._shared import Device, held_out, resolve_device
from lightning_moe.evaluation.stages import evaluate_stage, save_stage
from lightning_moe.models.loading import DtypeName
from lightning_moe.training.data import TextDataModule

log = logging.getLogger(__name__)


def evaluate(
    *,
    model: str,
    out: str,
    data: TextDataModule,
    adapter: str | None = None,
    name: str = "evaluated",
    prune_ratio: float | None = None,
    dtype: DtypeName = "float32",
    device: Device = "auto",
) -> None:
    """Loss and perplexity per validation corpus, bytes on disk, stored and active parameters of a folder.

    Args:
        model: Folder, `asset:small_moe` or hub name: dense, ragged or packed.
        out: Folder of results; the row goes to `<out>/stages/<name>.json`.
        data: The data module; its `validation` corpora are used.
        adapter: Folder of a PEFT adapter to load on top.
        name: Name of the row.
        prune_ratio: The ratio the row states; as counted in the folder if not given.
        dtype: Type of the unpacked weights.
        device: Where it runs; `auto` is the GPU if there is one.
    """
    row = evaluate_stage(
        name,
        folder=resolve_asset(model),
        adapter=adapter,
        loaders=held_out(data),
        prune_ratio=prune_ratio,
        seconds=0.0,
        dtype=dtype,
        device=resolve_device(device),
    )
    save_stage(out, stage=row)
    log.info("%s", "\n".join(f"{corpus}: {nll:.4f} nats" for corpus, nll in row["nll_per_corpus"].items()))
    file = Path(out) / "stages" / f"{name}.json"
    log.info("%s: %.4f nats per token, written to %s.", name, row["nll"], file)
