"""The command `calibrate`."""

import logging

from lightning_moe.calibration.collector import collect_statistics
from lightning_moe.commands._shared import Device, load_on
from lightning_moe.models.loading import DtypeName
from lightning_moe.training.data import TextDataModule

log = logging.getLogger(__name__)


def calibrate(
    *,
    model: str,
    out: str,
    data: TextDataModule,
    dtype: DtypeName = "auto",
    moments: bool = True,
    device: Device = "auto",
) -> None:
    """One forward pass over the calibration corpora: every statistic that any method needs, in one file.

    Args:
        model: Folder, `asset:small_moe` or hub name of the model.
        out: File to write (safetensors).
        data: The data module; its `calibration` corpora are used.
        dtype: Type of the weights during the pass.
        moments: Also gather the [E, H] and [E, E] sums that some expert criteria want.
        device: Where it runs; `auto` is the GPU if there is one.
    """
    loaded = load_on(model, dtype=dtype, device=device)
    statistics = collect_statistics(loaded, loaders=data.calibration_dataloaders(), moments=moments)
    statistics.save(out)
    log.info("Statistics of corpora %s written to %s.", list(statistics.corpora), out)
