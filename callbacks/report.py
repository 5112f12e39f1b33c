"""CompressionReport: measure what was exported, and write the rows and the page."""

import logging
import time
from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from typing_extensions import override

from callbacks._loaders import validation_loaders
from callbacks._trainer import find_callback, find_optional
from callbacks.calibration import ExpertCalibration
from callbacks.channel_pruning import prunings
from callbacks.export import ExportPruned
from callbacks.router_monitor import RouterMonitor
from lightning_moe.evaluation.stages import check_stage_name, evaluate_stage, save_stage
from lightning_moe.export.result import ExportResult
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
        prune_ratio: The ratio the row states; null: what was asked of ChannelPruning.
    """

    def __init__(self, *, folder: str, name: str, prune_ratio: float | None = None) -> None:
        self.folder = Path(folder)
        self.name = check_stage_name(name)
        self.prune_ratio = prune_ratio
        self._started = time.perf_counter()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks the order of the list and the held-out text; the clock runs from calibration on."""
        find_callback(trainer, ExportPruned, before=self)
        validation_loaders(trainer)
        calibration = find_optional(trainer, ExpertCalibration)
        self._started = time.perf_counter() if calibration is None else calibration.started

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluates and writes, on rank 0."""
        if not trainer.is_global_zero:
            return
        seconds = time.perf_counter() - self._started
        export = find_callback(trainer, ExportPruned, before=self)
        for result in export.results:
            self._add_row(trainer, result, seconds=seconds)
        write_json(
            self.folder / "stages" / f"{self.name}.exports.json", [result.to_dict() for result in export.results]
        )
        self._write_page(trainer)

    def _add_row(self, trainer: Trainer, result: ExportResult, *, seconds: float) -> None:
        """Evaluates one exported folder and keeps its row."""
        stage = evaluate_stage(
            self.name + _SUFFIXES.get(result.format, f"_{result.format}"),
            folder=result.base,
            adapter=result.adapter,
            loaders=validation_loaders(trainer),
            prune_ratio=self._ratio(trainer),
            seconds=seconds,
            device=trainer.strategy.root_device,
        )
        stage["steps"] = trainer.global_step
        save_stage(self.folder, stage=stage)
        log.info("%s: %.4f nats per token, %d bytes.", stage["name"], stage["nll"], stage["bytes"])

    def _ratio(self, trainer: Trainer) -> float | None:
        """The ratio that was asked for; None, to be read off the folder, where this run cut nothing."""
        if self.prune_ratio is not None:
            return self.prune_ratio
        return max((pruning.requested_ratio for pruning in prunings(trainer)), default=None)

    def _write_page(self, trainer: Trainer) -> None:
        """The page of the last plan, of the statistics it was made from and of the routers; none without any of it."""
        calibration = find_optional(trainer, ExpertCalibration)
        statistics = None if calibration is None else calibration.statistics
        made = [plan for pruning in prunings(trainer) for plan in pruning.plans]
        fitting = [plan for plan in made if statistics is None or plan.shape == statistics.shape]
        plans = {self.name: fitting[-1]} if fitting else {}
        routing = _routing(trainer)
        if plans or statistics is not None or routing:
            folder = self.folder / self.name
            write_report(folder, title=self.name, plans=plans, statistics=statistics, routing=routing)


def _routing(trainer: Trainer) -> dict[str, dict[str, list[float]]] | None:
    """Router entropies before and after training, where a RouterMonitor took them."""
    monitor = find_optional(trainer, RouterMonitor)
    if monitor is None or monitor.before is None or monitor.after is None:
        return None
    tables = {"before": monitor.before, "after": monitor.after}
    return {f"{when} (step {table.step})": table.entropies() for when, table in tables.items()}
