"""ExpertCalibration: gather or load the statistics that pruning is decided on."""

import logging
import time
from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from transformers import PreTrainedModel
from typing_extensions import override

from callbacks._trainer import (
    Loaders,
    calibration_loaders,
    is_first_setup,
    language_model,
    move_to_device,
    text_data,
)
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
        self.started = time.perf_counter()
        self._model: PreTrainedModel | None = None
        self._loaders: Loaders | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before anything is wrapped: load or collect, once."""
        self.started = time.perf_counter()
        model = language_model(pl_module)
        if not is_first_setup(self, model=model, done=self._model):
            return
        self.statistics = self._load(trainer, model)
        if self.statistics is None:
            self.collect(trainer, pl_module)
            self._save(trainer)
        self._model = model

    def loaders(self, trainer: Trainer) -> Loaders:
        """The batches that are calibrated on, by corpus; the same ones each time."""
        if self._loaders is None:
            self._loaders = calibration_loaders(trainer, num_batches=self.num_batches)
        return self._loaders

    def collect(self, trainer: Trainer, pl_module: LightningModule) -> CalibrationStatistics:
        """Calibrates the model as it is now; `statistics` are these from then on."""
        loaders = self.loaders(trainer)
        move_to_device(trainer, pl_module)
        self.statistics = collect_statistics(language_model(pl_module), loaders=loaders, moments=self.moments)
        return self.statistics

    def _load(self, trainer: Trainer, model: PreTrainedModel) -> CalibrationStatistics | None:
        if self.file is None or not Path(self.file).exists():
            return None
        statistics = CalibrationStatistics.load(self.file)
        if statistics.shape != model_shape(model):
            raise ValueError(
                f"The statistics in '{self.file}' were made on another model. Name another file, or delete this one to "
                "calibrate again."
            )
        datamodule = text_data(trainer)
        wanted = set() if datamodule is None else set(datamodule.calibration_names)
        if wanted and wanted != set(statistics.corpora):
            raise ValueError(
                f"The statistics in '{self.file}' are of the corpora {sorted(statistics.corpora)}, and "
                f"`data.calibration` names {sorted(wanted)}. Name another file, or delete this one to calibrate again."
            )
        log.info("Statistics of corpora %s loaded from %s.", list(statistics.corpora), self.file)
        return statistics

    def _save(self, trainer: Trainer) -> None:
        if self.file is not None and self.statistics is not None and trainer.is_global_zero:
            self.statistics.save(self.file)
