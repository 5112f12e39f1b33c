"""ExpertCalibration: gather or load the statistics that pruning is decided on."""

import logging
from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from typing_extensions import override

from callbacks._trainer import Loaders, calibration_loaders, language_model
from lightning_moe.calibration.collector import collect_statistics
from lightning_moe.models.discovery import model_shape
from lightning_moe.records import CalibrationStatistics

log = logging.getLogger(__name__)


class ExpertCalibration(Callback):
    """Runs the calibration corpora through the model once, before training, and keeps every statistic.

    With a `file` that exists, the statistics are loaded instead; they must have been made on this model.

    Args:
        file: Where the statistics are loaded from, or written to if the file does not exist. Null: kept in memory.
        num_batches: Batches of each corpus; null: all of `data.calibration`. Needed when training batches are used
            because there are no calibration corpora.
        moments: Also gather the [E, H] and [E, E] sums that some expert criteria want.
    """

    def __init__(self, *, file: str | None = None, num_batches: int | None = None, moments: bool = True) -> None:
        if num_batches is not None and num_batches < 1:
            raise ValueError(f"`num_batches` must be at least 1, got {num_batches}.")
        self.file = file
        self.num_batches = num_batches
        self.moments = moments
        self.statistics: CalibrationStatistics | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before anything is wrapped: load or collect, once."""
        if self.statistics is None:
            self.statistics = self._load(pl_module) or self.collect(trainer, pl_module)

    def loaders(self, trainer: Trainer, pl_module: LightningModule) -> Loaders:
        """The batches that are calibrated on, by corpus."""
        return calibration_loaders(trainer, pl_module, num_batches=self.num_batches)

    def collect(self, trainer: Trainer, pl_module: LightningModule) -> CalibrationStatistics:
        """Calibrates the model as it is now, and writes the file if one was named and does not exist."""
        model = language_model(pl_module)
        statistics = collect_statistics(model, loaders=self.loaders(trainer, pl_module), moments=self.moments)
        if self.file is not None and not Path(self.file).exists() and trainer.is_global_zero:
            statistics.save(self.file)
        return statistics

    def _load(self, pl_module: LightningModule) -> CalibrationStatistics | None:
        if self.file is None or not Path(self.file).exists():
            return None
        statistics = CalibrationStatistics.load(self.file)
        if statistics.shape != model_shape(language_model(pl_module)):
            raise ValueError(
                f"The statistics in '{self.file}' were made on another model. Name another file, or delete this one to "
                "calibrate again."
            )
        log.info("Statistics of corpora %s loaded from %s.", list(statistics.corpora), self.file)
        return statistics
