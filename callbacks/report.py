"""CompressionReport: measure what was exported, and write the rows and the page."""

import logging
import time
from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from typing_extensions import override

from callbacks._trainer import find_callback, find_optional, validation_loaders
from callbacks.calibration import ExpertCalibration
from callbacks.channel_pruning import last_plan
from callbacks.export import ExportPruned
from lightning_moe.evaluation.stages import evaluate_stage, save_stage
from lightning_moe.files import write_json
from lightning_moe.reporting.report import write_report

log = logging.getLogger(__name__)
_SUFFIXES = {"adapter": "", "merged_nf4": "_merged", "merged": "_merged_16bit"}


class CompressionReport(Callback):
    """After training, evaluates every exported folder from disk and writes one row each, and an HTML page.

    Stands after `ExportPruned` in the list. A row is `<folder>/stages/<name>[_<format>].json`; `lightning_moe report`
    gathers rows of several runs.

    Args:
        folder: Where rows and page go.
        name: Name of this run in tables.
        prune_ratio: The ratio the row states; null: the plan's.
    """

    def __init__(self, *, folder: str, name: str, prune_ratio: float | None = None) -> None:
        self.folder = Path(folder)
        self.name = name
        self.prune_ratio = prune_ratio
        self._started = time.perf_counter()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks the order of the list, and starts the clock."""
        find_callback(trainer, ExportPruned, before=self)
        self._started = time.perf_counter()

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluates and writes, on rank 0."""
        if not trainer.is_global_zero:
            return
        seconds = time.perf_counter() - self._started
        export = find_callback(trainer, ExportPruned, before=self)
        callbacks = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        plan = last_plan(callbacks)
        ratio = self.prune_ratio if self.prune_ratio is not None else plan.prune_ratio if plan else 0.0
        for result in export.results:
            stage = evaluate_stage(
                self.name + _SUFFIXES.get(result.format, f"_{result.format}"),
                folder=result.base,
                adapter=result.adapter,
                loaders=validation_loaders(trainer),
                prune_ratio=ratio,
                seconds=seconds,
            )
            save_stage(self.folder, stage=stage)
            log.info("%s: %.4f nats per token, %d bytes.", stage["name"], stage["nll"], stage["bytes"])
        write_json(
            self.folder / "stages" / f"{self.name}.exports.json", [result.to_dict() for result in export.results]
        )
        calibration = find_optional(trainer, ExpertCalibration)
        plans = {} if plan is None else {self.name: plan}
        write_report(
            self.folder / self.name,
            title=self.name,
            summary=None,
            plans=plans,
            statistics=calibration.statistics if calibration else None,
        )
