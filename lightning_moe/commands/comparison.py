"""The command `compare`."""

import logging

from lightning_moe.commands._shared import Device, held_out, resolve_device
from lightning_moe.evaluation.compare import StageSpec, compare_stages
from lightning_moe.models.loading import DtypeName
from lightning_moe.records import CalibrationStatistics
from lightning_moe.training.data import TextDataModule

log = logging.getLogger(__name__)


def compare(
    *,
    model: str,
    statistics: str,
    out: str,
    stages: list[StageSpec],
    data: TextDataModule,
    dtype: DtypeName = "float32",
    device: Device = "auto",
) -> None:
    """Methods and ratios side by side: each is cut, saved, reloaded and evaluated on held-out text.

    Args:
        model: Folder, `asset:small_moe` or hub name of the dense model.
        statistics: File written by `calibrate`.
        out: Folder of results.
        stages: Rows to make; those of the same cut must follow each other to share it.
        data: The data module; `calibration` for the repair, `validation` to evaluate.
        dtype: Type of the weights while they are cut and evaluated.
        device: Where it runs; `auto` is the GPU if there is one.
    """
    loaders = held_out(data)
    compare_stages(
        model,
        stages=stages,
        statistics=CalibrationStatistics.load(statistics),
        calibration=data.calibration_dataloaders(),
        held_out=loaders,
        out=out,
        dtype=dtype,
        device=resolve_device(device),
    )
