"""The command `calibrate`."""

import logging

from lightning_moe.calibration.collector import collect_statistics
from lightning_moe.calibration.gradients import check_unpacked, collect_gradients
from lightning_moe.commands._shared import Device, load_on
from lightning_moe.models.discovery import moe_layers
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
    gradients: bool = False,
    device: Device = "auto",
) -> None:
    """One forward pass over the calibration corpora: every statistic that any method needs, in one file.

    Args:
        model: Folder, `asset:small_moe` or hub name of the model.
        out: File to write (safetensors).
        data: The data module; its `calibration` corpora are used.
        dtype: Type of the weights during the pass.
        moments: Also gather the [E, H] and [E, E] sums that some expert criteria want.
        gradients: Then also run backward through the model, for the channel criteria `snip` and `taylor`: about twice
            the time again, the activations of one batch in memory, not on 4-bit experts.
        device: Where it runs; `auto` is the GPU if there is one.
    """
    loaded = load_on(model, dtype=dtype, device=device)
    if gradients:
        check_unpacked(moe_layers(loaded))
    statistics = collect_statistics(loaded, loaders=data.calibration_dataloaders(), moments=moments)
    statistics.save(out)
    if gradients:
        log.info("Statistics of the forward pass written to %s; gradients follow.", out)
        statistics.with_sums(collect_gradients(loaded, loaders=data.calibration_dataloaders())).save(out)
    log.info("Statistics of corpora %s written to %s.", list(statistics.corpora), out)
