"""Cuts during training, for any loop: plain PyTorch, transformers' Trainer, and the Lightning callbacks."""

import logging
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_moe.allocation import build_method
from lightning_moe.allocation.methods import ExpertMethod, PruningMethod
from lightning_moe.calibration.collector import Batch, collect_statistics
from lightning_moe.calibration.processes import ALONE, Processes
from lightning_moe.models.channel_experts import ChannelExperts
from lightning_moe.models.discovery import find_language_model, model_shape, moe_layers
from lightning_moe.records import CalibrationStatistics, PrunePlan
from lightning_moe.surgery.cut import apply_plan, convert_experts
from lightning_moe.surgery.feasibility import check_adapters, check_reachable, remaining_ratio, unpruned_shape
from lightning_moe.surgery.optimizer_state import check_optimizers, unwrapped
from lightning_moe.surgery.parameters import check_parameters
from lightning_moe.surgery.repair import Repair
from lightning_moe.surgery.schedule import Schedule, build_schedule

log = logging.getLogger(__name__)
_WHOLE = " (the ratio is met to the nearest whole expert of each layer)"


class ScheduledPruner:
    """Cuts a model at steps of its training; optimizers follow: same objects and groups, moments of what stays.

        pruner = ScheduledPruner(model, schedule=[(100, 0.25), (200, 0.5)], loaders={"text": batches})
        optimizer = torch.optim.AdamW(model.parameters())  # after the pruner, which replaces the experts' parameters
        for step, batch in enumerate(training_batches):
            pruner.step(step, optimizers=[optimizer])
            ...

    The model is calibrated as it is at each cut, adapters included, in eval mode, and gets its own modes back. Works
    on 16-bit and 4-bit experts, bare or under our adapters. Call `step` before each batch, between optimizer steps:
    gradients are dropped at a cut. Under DistributedDataParallel make the wrapper anew after a cut.

    Args:
        model: a transformers MoE, or a module that holds exactly one; its experts become ChannelExperts.
        schedule: `[(step, prune_ratio), ...]`, a `GradualSchedule` or a `PruneSchedule`. Ratios are shares of the
            unpruned model's channels that are gone from then on, whoever removed them.
        method: name of a method or an object; blocks are chosen for the unpruned widths.
        method_args: settings of a method given by name.
        loaders: corpus name -> batches with `input_ids` and, where there is padding, `attention_mask`; read at each
            cut, so nothing that can be read only once. Not needed where `step` gets statistics.
        moments: gather the [E, H] and [E, E] sums too, which some expert criteria want.
        processes: those that calibrate together; all call `step` with the same numbers.

    Raises:
        ValueError: a schedule or method that cannot work on this model, adapters that are not ours, or loaders that can
            be read only once.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        schedule: Schedule,
        method: str | PruningMethod = "exact_global",
        method_args: Mapping[str, Any] | None = None,
        loaders: Mapping[str, Iterable[Batch]] | None = None,
        moments: bool = True,
        processes: Processes = ALONE,
    ) -> None:
        self.model = find_language_model(model)
        self.schedule = build_schedule(schedule)
        self.loaders = _checked_loaders(loaders)
        self.moments = moments
        self.processes = processes
        self.plans: list[PrunePlan] = []
        check_adapters(self.model)
        stock = (layer.experts for layer in moe_layers(self.model) if layer.experts is layer.base_experts)
        self._given_up = [weakref.ref(p) for e in stock if not isinstance(e, ChannelExperts) for p in e.parameters()]
        convert_experts(self.model)
        unpruned = unpruned_shape(self.model)
        self.num_channels = unpruned.num_channels
        self.method = build_method(method, **(method_args or {})).resolved(unpruned)
        check_reachable(unpruned, method=self.method, prune_ratio=self.schedule.prune_ratio)
        self._num_cuts = 0
        self._since: float | None = None

    @property
    def reached_ratio(self) -> float:
        """The ratio of the last cut that is behind us."""
        return self.schedule.cuts[self._num_cuts - 1][1] if self._num_cuts else 0.0

    def step(
        self,
        step: int,
        *,
        optimizers: Sequence[Optimizer],
        statistics: Callable[[], CalibrationStatistics] | None = None,
    ) -> PrunePlan | None:
        """Cuts if a cut is due at this optimizer step; returns the plan that was carried out.

        Args:
            step: optimizer steps done so far; several calls with one number cut once.
            optimizers: all that hold parameters of the model, bare or wrapped by accelerate.
            statistics: gives statistics of the model as it is; `loaders` are run through it when not given.

        Raises:
            ValueError: an optimizer that cannot follow a cut or was made before the pruner, or no text to calibrate on.
        """
        if self._since is None:
            self.check_optimizers(optimizers)
            self._since = time.perf_counter()
        prune_ratio = self.due(step)
        if prune_ratio is None:
            return None
        if remaining_ratio(self.model, prune_ratio=prune_ratio) == 0:
            self._mark(prune_ratio)
            log.info("Step %d: nothing to cut, %.4g of the channels are gone already.", step, prune_ratio)
            return None
        started = time.perf_counter()
        gathered = self._calibrate() if statistics is None else statistics()
        calibrated = time.perf_counter()
        plan = self.cut(gathered, prune_ratio=prune_ratio, optimizers=optimizers)
        self._log(step, plan=plan, times=(self._since, started, calibrated, time.perf_counter()))
        self._since = time.perf_counter()
        return plan

    def due(self, step: int) -> float | None:
        """The ratio of the cut that is due at this step and not done; of several overdue ones the last."""
        due = self.schedule.due(step=step, num_done=self._num_cuts)
        return None if due is None else due[1]

    def cut(
        self,
        statistics: CalibrationStatistics,
        *,
        prune_ratio: float,
        optimizers: Sequence[Optimizer],
        repair: Callable[[PrunePlan], Repair | None] | None = None,
    ) -> PrunePlan:
        """Decides on these statistics of the model as it is, cuts, and lets the optimizers follow.

        Args:
            statistics: of the present model.
            prune_ratio: share of the unpruned model's channels that is gone afterwards.
            optimizers: all that hold parameters of the model.
            repair: makes the repair of the plan that was decided; none when not given.

        Raises:
            ValueError: the method cannot meet the ratio, or an optimizer's state cannot follow.
        """
        plan = self.method.plan(statistics, prune_ratio=remaining_ratio(self.model, prune_ratio=prune_ratio))
        if self.processes.size > 1:
            plan = PrunePlan.from_dict(self.processes.gather(plan.to_dict())[0])
        bare = [unwrapped(optimizer) for optimizer in optimizers]
        for optimizer in bare:
            optimizer.zero_grad(set_to_none=True)
        refit = None if repair is None else repair(plan)
        apply_plan(self.model, plan=plan, repair=refit, optimizers=bare)
        self._mark(prune_ratio)
        self.plans.append(plan)
        return plan

    def check_optimizers(self, optimizers: Iterable[Optimizer]) -> None:
        """Refuses, before the first batch, optimizers that could not follow a cut.

        Raises:
            ValueError: with the optimizer's name, or one that holds parameters which the pruner has replaced; or
                somebody has put hooks on the gradients of parameters that a cut replaces.
        """
        optimizers = list(optimizers)
        check_optimizers(optimizers)
        check_parameters(moe_layers(self.model))
        held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
        if any(id(parameter) in held for parameter in (ref() for ref in self._given_up) if parameter is not None):
            raise ValueError(
                "The optimizer was made before the pruner, which replaces the experts' parameters: they would never be "
                "trained. Make the optimizer after the pruner."
            )
        self._given_up = []

    def state_dict(self) -> dict[str, Any]:
        """What was done, and with which settings: plain types."""
        plans = [plan.to_dict() for plan in self.plans]
        return {"num_cuts": self._num_cuts, "plans": plans, "settings": self._settings()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a saved state; the model must have the structure that it had then.

        Raises:
            ValueError: the state was made with other settings, or the model is wider than the last plan left it.
        """
        if state["settings"] != self._settings():
            raise ValueError(
                f"The checkpoint was made with the pruning settings {state['settings']}, got {self._settings()}. "
                "Resume with the settings it was trained with."
            )
        plans = [PrunePlan.from_dict(plan) for plan in state["plans"]]
        present = model_shape(self.model).num_channels
        if plans and present > plans[-1].num_kept:
            raise ValueError(
                f"The model has {present} channels, and {plans[-1].num_kept} were left when this state was saved. Give "
                "the model the checkpoint's structure before loading the state."
            )
        self.plans, self._num_cuts = plans, int(state["num_cuts"])

    def _settings(self) -> dict[str, Any]:
        cuts = [[step, ratio] for step, ratio in self.schedule.cuts]
        return {"schedule": cuts, "method": self.method.name, "method_args": asdict(self.method)}

    def _mark(self, prune_ratio: float) -> None:
        self._num_cuts = sum(ratio <= prune_ratio for _, ratio in self.schedule.cuts)

    def _calibrate(self) -> CalibrationStatistics:
        if self.loaders is None:
            raise ValueError("A cut is due and there is no text to calibrate on: give the pruner `loaders`.")
        return collect_statistics(self.model, loaders=self.loaders, moments=self.moments, processes=self.processes)

    def _log(self, step: int, *, plan: PrunePlan, times: tuple[float, float, float, float]) -> None:
        if self.processes.rank:
            return
        since, started, calibrated, done = times
        evicted = sum(len(plan.evicted(index)) for index in range(len(plan.keep)))
        log.info(
            "Step %d: %d of %d channels kept (%.1f %%), %d experts evicted%s; calibration %.2f s, surgery %.2f s: %.1f "
            "%% of the %.1f s of training before it.",
            step,
            plan.num_kept,
            self.num_channels,
            100 * plan.num_kept / self.num_channels,
            evicted,
            _WHOLE if isinstance(self.method, ExpertMethod) else "",
            calibrated - started,
            done - calibrated,
            100 * (done - started) / max(started - since, 1e-9),
            started - since,
        )


def _checked_loaders(loaders: Mapping[str, Iterable[Batch]] | None) -> Mapping[str, Iterable[Batch]] | None:
    for corpus, loader in (loaders or {}).items():
        if isinstance(loader, Iterator):
            raise ValueError(
                f"The loader of corpus '{corpus}' is a {type(loader).__name__}, which can be read only once, and every "
                "cut reads it. Give a list of batches or a DataLoader."
            )
    return loaders
