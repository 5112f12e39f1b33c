"""What one sample of the calibration text gives: statistics, kept on disk, and Gram matrices, kept in memory."""

import logging
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lightning_moe.calibration.collector import collect_statistics
from lightning_moe.calibration.gradients import collect_gradients
from lightning_moe.calibration.gram import iterate_grams
from lightning_moe.calibration.gram_sums import LayerGram
from lightning_moe.calibration.routed import sum_dtype
from lightning_moe.evaluation.compare.digests import Loaders, settings_digest, text_digest
from lightning_moe.files import read_json, write_json
from lightning_moe.models.discovery import model_shape
from lightning_moe.records import CalibrationStatistics

log = logging.getLogger(__name__)

_GB = 2**30
_NUM_HALVES = 2


@dataclass(frozen=True, kw_only=True, eq=False)
class SampleCalibration:
    """Everything that one sample of the text says about one model; each part is made when it is first asked for.

    Args:
        model: the dense model.
        loaders: batches of the sample, by corpus.
        file: where the statistics are kept; beside it a JSON file says what they were made from.
        origin: what decides the statistics besides the text: digest of the model, type, version.
        gradients: also gather the sums that need gradients of the loss.
        given: statistics that exist already; nothing is gathered then.
        memory_gb: GiB that the Gram matrices may take to be kept for all rows.
    """

    model: PreTrainedModel
    loaders: Loaders
    file: Path
    origin: dict[str, Any]
    gradients: bool = False
    given: CalibrationStatistics | None = None
    memory_gb: float = 4.0

    @cached_property
    def text(self) -> str:
        """Digest of the text."""
        return text_digest(self.loaders)

    @cached_property
    def digest(self) -> str:
        """Of what decides plans and repairs; of given statistics, whose text is not known, the numbers themselves."""
        given = None if self.given is None else self.given.digest
        return settings_digest({"text": self.text, "given": given})

    @cached_property
    def statistics(self) -> CalibrationStatistics:
        """Given, read from the file if it was made from the same model and text, or gathered in one pass and kept."""
        if self.given is not None:
            return self.given
        note, wanted = self.file.with_suffix(".json"), self.origin | {"text": self.text}
        made = read_json(note, what="note on statistics") if self.file.is_file() and note.is_file() else {}
        if not isinstance(made, dict):
            raise ValueError(f"'{note}' must be a mapping, got {type(made).__name__}. Delete it.")
        known = wanted == {name: made.get(name) for name in wanted}
        if known and (made.get("gradients") is True or not self.gradients):
            log.info("Statistics of '%s' are of this model and text: reused.", self.file)
            return CalibrationStatistics.load(self.file)
        gathered = self._gather(CalibrationStatistics.load(self.file) if known else None)
        note.unlink(missing_ok=True)  # it never stands beside statistics that it does not describe
        gathered.save(self.file)
        write_json(note, wanted | {"gradients": self.gradients})
        return CalibrationStatistics.load(self.file)

    def _gather(self, known: CalibrationStatistics | None) -> CalibrationStatistics:
        """One pass over the text, and another with gradients where they are wanted."""
        statistics = known or collect_statistics(self.model, loaders=self.loaders)
        if not self.gradients:
            return statistics
        return statistics.with_sums(collect_gradients(self.model, loaders=self.loaders))

    @cached_property
    def grams(self) -> tuple[tuple[LayerGram, ...], float] | None:
        """Gram matrices of all experts and the seconds they took; None where they do not fit in `memory_gb`."""
        layers = model_shape(self.model).layers
        itemsize = sum_dtype(self.model.dtype).itemsize
        size = _NUM_HALVES * itemsize * sum(width**2 for layer in layers for width in layer.widths)
        if size > self.memory_gb * _GB:
            return None
        started = time.perf_counter()
        made = tuple(iterate_grams(self.model, loaders=self.loaders, memory_gb=self.memory_gb))
        return made, time.perf_counter() - started

    def forget_grams(self) -> None:
        """Gives up their memory."""
        vars(self).pop("grams", None)
