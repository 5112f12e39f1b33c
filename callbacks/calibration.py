"""ExpertCalibration: gather or load the statistics that pruning is decided on."""

import logging
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import override

from callbacks._strategy import processes
from callbacks._trainer import (
    Loaders,
    calibration_loaders,
    callbacks_of,
    is_first_setup,
    language_model,
    move_to_device,
    resumed_checkpoint,
    text_data,
)
from lightning_moe.calibration.collector import collect_statistics
from lightning_moe.calibration.processes import ALONE, OwnShare
from lightning_moe.models.discovery import model_shape
from lightning_moe.records import CalibrationStatistics

log = logging.getLogger(__name__)


class StatisticsUser(Callback):
    """A callback that decides on statistics: before training, or at steps of it."""

    @property
    @abstractmethod
    def in_training(self) -> bool:
        """Whether it asks at steps of training, and not before."""


class ExpertCalibration(Callback):
    """Runs text through the model and keeps every statistic: once before training, and again at each scheduled cut.

    With a `file` that exists, the statistics before training are loaded instead; they must have been made on this
    model. A run that goes on from a checkpoint, or has scheduled cuts only, does not calibrate before training.

    Args:
        file: Where the statistics are loaded from, or written to if the file does not exist. Null: kept in memory.
        num_batches: Batches of each corpus; null: all of `data.calibration`. Needed when training batches are used
            because there are no calibration corpora.
        window: For scheduled cuts: calibrate on this many batches that training saw last (of every process), instead
            of `data.calibration` or the first training batches. A checkpoint holds them.
        moments: Also gather the [E, H] and [E, E] sums that some expert criteria want.
    """

    def __init__(
        self,
        *,
        file: str | None = None,
        num_batches: int | None = None,
        window: int | None = None,
        moments: bool = True,
    ) -> None:
        for name, value in (("num_batches", num_batches), ("window", window)):
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        self.file = file
        self.num_batches = num_batches
        self.window = window
        self.moments = moments
        self.statistics: CalibrationStatistics | None = None
        self.started = time.perf_counter()
        self._model: PreTrainedModel | None = None
        self._loaders: Loaders | None = None
        self._seen = _OwnBatches(maxlen=window)
        self._processes = ALONE

    @property
    def state_key(self) -> str:
        """Two calibrations in one trainer keep their states apart."""
        return self._generate_state_key(file=self.file, num_batches=self.num_batches)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before anything is wrapped: load or collect, once, where a cut before training needs it."""
        self.started = time.perf_counter()
        model = language_model(pl_module)
        if not is_first_setup(self, model=model, done=self._model):
            return
        self._model, self._processes = model, processes(trainer)
        asked = [user.in_training for user in callbacks_of(trainer) if isinstance(user, StatisticsUser)]
        if self.window is not None and not any(asked):
            raise ValueError(f"`window: {self.window}` is for scheduled cuts, and no callback here has a `schedule`.")
        if self.window is None and any(asked):
            self.loaders(trainer)  # the first training batches, where they are used: read before training reads
        self.statistics = self._load(trainer, model)
        if not (asked and all(asked)) and self.statistics is None and resumed_checkpoint(trainer) is None:
            self.collect(trainer, pl_module)
            self._save(trainer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remembers the tokens of the batch; on its device, so that nobody waits for a copy."""
        if self.window is not None:
            self._seen.append(_tokens_of(batch))

    @override
    def state_dict(self) -> dict[str, Any]:
        """The window of every process, int32 on the CPU; all processes ask for it together."""
        if self.window is None:
            return {}
        own = [{name: value.cpu() for name, value in batch.items()} for batch in self._seen]
        return {"window": self.window, "batches": self._processes.gather(own)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Each process gets its own window back; with another number of processes the batches are dealt out anew."""
        if state_dict.get("window") != self.window:
            raise ValueError(
                f"The checkpoint was made with `window: {state_dict.get('window')}`, got {self.window}. Resume with "
                "the settings it was trained with."
            )
        windows: list[list[dict[str, Tensor]]] = state_dict.get("batches", [])
        if len(windows) == self._processes.size:
            self._seen.extend(windows[self._processes.rank])
        else:
            self._seen.extend(self._processes.share([batch for window in windows for batch in window]))

    def loaders(self, trainer: Trainer) -> Loaders:
        """The batches that are calibrated on, by corpus; the same ones each time."""
        if self._loaders is None:
            self._loaders = calibration_loaders(trainer, num_batches=self.num_batches)
        return self._loaders

    def statistics_of(self, trainer: Trainer, pl_module: LightningModule) -> CalibrationStatistics:
        """Statistics of the model before training; collected again if it was cut since."""
        if self.statistics is None or self.statistics.shape != model_shape(language_model(pl_module)):
            return self.collect(trainer, pl_module)
        return self.statistics

    def collect(self, trainer: Trainer, pl_module: LightningModule) -> CalibrationStatistics:
        """Calibrates the model as it is now, before training; `statistics` are these from then on."""
        return self._run(trainer, pl_module, self.loaders(trainer))

    def collect_in_training(self, trainer: Trainer, pl_module: LightningModule) -> CalibrationStatistics:
        """Calibrates the model as it is now, in training and in its precision; `statistics` are these from then on."""
        with trainer.precision_plugin.forward_context():
            loaders = self.loaders(trainer) if self.window is None else {"train": self._seen}
            return self._run(trainer, pl_module, loaders)

    def _run(self, trainer: Trainer, pl_module: LightningModule, loaders: Loaders) -> CalibrationStatistics:
        move_to_device(trainer, pl_module)
        self.statistics = collect_statistics(
            language_model(pl_module), loaders=loaders, moments=self.moments, processes=self._processes
        )
        return self.statistics

    def _load(self, trainer: Trainer, model: PreTrainedModel) -> CalibrationStatistics | None:
        there = self.file is not None and Path(self.file).exists()
        if self.file is None or not all(self._processes.gather(there)):  # machines may not share a disk
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


class _OwnBatches(deque[dict[str, Tensor]], OwnShare):
    """Batches that this process trained on: they are its share."""


def _tokens_of(batch: Any) -> dict[str, Tensor]:
    """Ids and mask of a training batch as int32."""
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        raise ValueError(
            f"`window` needs training batches that are dicts with `input_ids`, got {type(batch).__name__}. Use "
            "`data.calibration` or `num_batches`."
        )
    return {name: batch[name].to(torch.int32) for name in ("input_ids", "attention_mask") if name in batch}
