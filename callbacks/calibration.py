"""ExpertCalibration: gather or load the statistics that pruning is decided on."""

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from transformers import PreTrainedModel
from typing_extensions import override

from callbacks._loaders import Loaders, calibration_loaders, text_data
from callbacks._resumed import check_resumed
from callbacks._statistics import StatisticsUser
from callbacks._strategy import check_strategy, processes
from callbacks._trainer import (
    callbacks_of,
    is_first_setup,
    language_model,
    move_to_device,
    resumed_checkpoint,
    state_key_of,
)
from callbacks._window import Window, check_rememberable
from lightning_moe.allocation.budget import check_count
from lightning_moe.calibration.collector import collect_statistics
from lightning_moe.calibration.processes import ALONE
from lightning_moe.models.discovery import model_shape
from lightning_moe.records import CalibrationStatistics

log = logging.getLogger(__name__)


class ExpertCalibration(Callback):
    """Runs text through the model and keeps every statistic: once before training, and again at each scheduled cut.

    With a `file` that exists, the statistics before training are loaded instead; they must have been made on this
    model. A run that goes on from a checkpoint, or has scheduled cuts only, does not calibrate before training.

    Args:
        file: Where the statistics are loaded from, or written to if the file does not exist. Null: kept in memory.
        num_batches: Batches of each corpus; null: all of `data.calibration`. Needed when training batches are used
            because there are no calibration corpora; these are read in `fit` only.
        window: For scheduled cuts: calibrate on this many batches that training saw last (of every process), instead
            of `data.calibration` or the first training batches. A checkpoint holds them.
        moments: Also gather what `mone`, `expert_sparsity` and novices need: sums of experts x hidden size numbers.
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
            if value is not None:
                check_count(value, name=name, lowest=1)
        self.file = file
        self.num_batches = num_batches
        self.window = window
        self.moments = moments
        self.statistics: CalibrationStatistics | None = None
        self.started = time.perf_counter()
        self._model: PreTrainedModel | None = None
        self._loaders: Loaders | None = None
        self._seen = Window(maxlen=window)
        self._processes = ALONE
        self._in_training = False

    @property
    def state_key(self) -> str:
        """Two calibrations in one trainer keep their states apart, and one with other settings is another."""
        return state_key_of(self, file=self.file, num_batches=self.num_batches, window=self.window)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before anything is wrapped: load or collect, once, where a cut before training needs it."""
        self.started = time.perf_counter()
        check_strategy(trainer, scheduled=False)
        model, checkpoint = language_model(pl_module), resumed_checkpoint(trainer)
        first = is_first_setup(self, model=model, done=self._model)
        asked = [user.in_training for user in callbacks_of(trainer) if isinstance(user, StatisticsUser)]
        self._check_window(asked)
        if stage == "fit" and any(asked):
            self._prepare(trainer, checkpoint)
        if not first:
            return
        self._processes = processes(trainer)
        self.statistics = self._load(trainer, model)
        needed = not (asked and all(asked)) and self.statistics is None and checkpoint is None
        if needed and not self.has_text(trainer):
            return  # `fit` does it
        self._model = model
        if needed:
            self.collect(trainer, pl_module)
            self._save(trainer)

    def _check_window(self, in_training: Sequence[bool]) -> None:
        if self.window is not None and not any(in_training):
            raise ValueError(f"`window: {self.window}` is for scheduled cuts, and no callback here has a `schedule`.")

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Refuses what a window cannot remember, before it is trained on."""
        if self.window is not None:
            check_rememberable(batch)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remembers the tokens of the batch."""
        if self.window is not None:
            self._seen.remember(batch)

    @override
    def state_dict(self) -> dict[str, Any]:
        """The window of every process, int32 on the CPU; all processes ask for it together."""
        if self.window is not None:
            return {"batches": self._seen.gather(self._processes)}
        return {"batches": []} if self._in_training else {}  # some state: its key says how a schedule calibrates

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Each process gets its own window back; with another number of processes the batches are dealt out anew."""
        self._seen.restore(state_dict["batches"], processes=self._processes)

    def has_text(self, trainer: Trainer) -> bool:
        """Whether this loop has batches to calibrate on: training batches are there in `fit` alone."""
        data = text_data(trainer)
        return trainer.state.fn == "fit" or (data is not None and bool(data.calibration_names))

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

    def _prepare(self, trainer: Trainer, checkpoint: Mapping[str, Any] | None) -> None:
        """For cuts in training: with the settings of the checkpoint, and text read before training reads."""
        self._in_training = True
        if checkpoint is not None:
            check_resumed(self, checkpoint, required=False)
        if self.window is None:
            self.loaders(trainer)

    def _run(self, trainer: Trainer, pl_module: LightningModule, loaders: Loaders) -> CalibrationStatistics:
        move_to_device(trainer, pl_module)
        with isolate_rng():  # loaders draw numbers, and whether statistics are loaded must not change the run
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
