"""ChannelPruning: decide and cut, once before training or at configured steps of it."""

import logging
from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from typing_extensions import override

from callbacks._trainer import callbacks_of, find_callback, is_first_setup, language_model, loaded_callback_state
from callbacks.calibration import ExpertCalibration
from lightning_moe.allocation import build_method
from lightning_moe.allocation.budget import resolve_prune_ratio
from lightning_moe.models.discovery import model_shape
from lightning_moe.records import PrunePlan
from lightning_moe.surgery.cut import apply_plan, convert_experts
from lightning_moe.surgery.optimizer_state import follow_cut
from lightning_moe.surgery.repair import plan_repair
from lightning_moe.surgery.schedule import PruneSchedule, check_trainable, replay_cuts

log = logging.getLogger(__name__)


class ChannelPruning(Callback):
    """Cuts channels inside experts, and experts that lose all of them, out of any transformers MoE in the module.

    Give exactly one of `prune_ratio` or `keep_ratio` (one cut before training), `schedule` (cuts at steps of training;
    each recalibrates on the model as it is then) and `plan_file` (a plan made earlier). Needs an `ExpertCalibration`
    before it in the list, except with a plan and no repair.

    Args:
        prune_ratio: Share of routed-expert channels to remove before training, in [0, 1).
        keep_ratio: Share that stays, in (0, 1]: 1 - `prune_ratio`.
        schedule: `[[step, prune_ratio], ...]`, ascending; ratios count from the unpruned model. One device, not 4 bit.
        plan_file: A saved PrunePlan.
        method: `exact_global` (ours), `paper_a`, `uniform` or `reap`.
        method_args: Settings of the method, for example `{align: 64}`.
        repair: Refit the down projections by least squares (a second calibration pass). One-shot only.
        repair_memory_gb: Memory for the Gram matrices of the repair; more passes where it does not suffice.
        save_plan: Where the plan is written (of a schedule, the last one).
    """

    def __init__(
        self,
        *,
        prune_ratio: float | None = None,
        keep_ratio: float | None = None,
        schedule: list[tuple[int, float]] | None = None,
        plan_file: str | None = None,
        method: str = "exact_global",
        method_args: dict[str, Any] | None = None,
        repair: bool = True,
        repair_memory_gb: float = 4.0,
        save_plan: str | None = None,
    ) -> None:
        ratios = {"prune_ratio": prune_ratio, "keep_ratio": keep_ratio}
        given = ratios | {"schedule": schedule, "plan_file": plan_file}
        if sum(value is not None for value in given.values()) != 1:
            raise ValueError(
                f"Give exactly one of `prune_ratio`, `keep_ratio`, `schedule` and `plan_file`, got {given}. One that a "
                "config file sets is taken back by `null`."
            )
        one_shot = schedule is None and plan_file is None
        self.prune_ratio = resolve_prune_ratio(**ratios) if one_shot else None
        self.plan_file = plan_file
        self.schedule = None if schedule is None else PruneSchedule(cuts=tuple((s, r) for s, r in schedule))
        self.method = build_method(method, **(method_args or {}))
        self.repair = repair
        self.repair_memory_gb = repair_memory_gb
        self.save_plan = save_plan
        self.plans: list[PrunePlan] = []
        self._model: PreTrainedModel | None = None
        self._num_channels = 0
        self._num_cuts = 0
        self._hook: RemovableHandle | None = None

    @property
    def state_key(self) -> str:
        """Two schedules in one trainer keep their states apart."""
        return self._generate_state_key(schedule=str(self.schedule), plan=self.plan_file, ratio=self.prune_ratio)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """One-shot: plan and cut before optimizers exist. Scheduled: full-width ChannelExperts, ready for cuts."""
        model = language_model(pl_module)
        if not is_first_setup(self, model=model, done=self._model):
            return
        if self.schedule is not None:
            self._prepare(trainer, pl_module, schedule=self.schedule)
        else:
            self._cut_before_training(trainer, model)
        self._model = model

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Scheduled: cut when the step is reached (before the batch, between optimizer steps)."""
        if self.schedule is None:
            return
        due = self.schedule.due(step=trainer.global_step, num_done=self._num_cuts)
        if due is not None:
            self._num_cuts, prune_ratio = due
            self._cut_now(trainer, pl_module, prune_ratio=prune_ratio)

    @override
    def state_dict(self) -> dict[str, Any]:
        """The plans that were carried out, and how many cuts of the schedule are behind us."""
        return {"num_cuts": self._num_cuts, "plans": [plan.to_dict() for plan in self.plans]}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """On resume, after the weights are there: a single cut was made again in `setup` and must be the same."""
        plans = [PrunePlan.from_dict(plan) for plan in state_dict["plans"]]
        if self.schedule is None and [plan.digest for plan in plans] != [plan.digest for plan in self.plans]:
            raise ValueError(
                "The checkpoint belongs to another cut than the one just made. Resume with the settings and the "
                "calibration data it was trained with (`ExpertCalibration(file=...)` keeps the statistics)."
            )
        self._num_cuts = int(state_dict["num_cuts"])
        self.plans = plans

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Weights of a checkpoint are loaded by now; the model must be the one that was cut."""
        is_first_setup(self, model=language_model(pl_module), done=self._model)
        self._remove_hook()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leaves no hook behind."""
        self._remove_hook()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leaves no hook behind."""
        self._remove_hook()

    @property
    def requested_ratio(self) -> float:
        """The share of the unpruned model's channels that was to be removed until now."""
        if self.schedule is not None:
            return self.schedule.cuts[self._num_cuts - 1][1] if self._num_cuts else 0.0
        return self.plans[-1].prune_ratio if self.plans else 0.0

    def _prepare(self, trainer: Trainer, pl_module: LightningModule, *, schedule: PruneSchedule) -> None:
        schedule.check_trainer(num_devices=trainer.world_size)
        find_callback(trainer, ExpertCalibration, before=self)
        model = language_model(pl_module)
        check_trainable(model)
        shape = model_shape(model)
        self._num_channels = shape.num_channels
        self.method = self.method.resolved(shape)  # later cuts see narrower experts and must not change the blocks
        convert_experts(model)

        def cut_like_checkpoint(*_: object) -> None:
            state = loaded_callback_state(trainer, self)
            if state is not None and not self.plans:
                replay_cuts(model, plans=[PrunePlan.from_dict(plan) for plan in state["plans"]])

        self._hook = pl_module.register_load_state_dict_pre_hook(cut_like_checkpoint)

    def _remove_hook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = None

    def _cut_before_training(self, trainer: Trainer, model: PreTrainedModel) -> None:
        plan = trainer.strategy.broadcast(self._one_shot_plan(trainer))
        repair = None
        if self.repair and plan.num_kept < plan.shape.num_channels:
            loaders = find_callback(trainer, ExpertCalibration, before=self).loaders(trainer)
            repair = plan_repair(model, plan=plan, loaders=loaders, memory_gb=self.repair_memory_gb)
        apply_plan(model, plan=plan, repair=repair)
        self._keep(plan, trainer=trainer)

    def _one_shot_plan(self, trainer: Trainer) -> PrunePlan:
        if self.plan_file is not None:
            return PrunePlan.load(self.plan_file)
        calibration = find_callback(trainer, ExpertCalibration, before=self)
        assert calibration.statistics is not None
        assert self.prune_ratio is not None
        return self.method.plan(calibration.statistics, prune_ratio=self.prune_ratio)

    def _cut_now(self, trainer: Trainer, pl_module: LightningModule, *, prune_ratio: float) -> None:
        """Recalibrate, plan, cut, and let the optimizers follow."""
        model = language_model(pl_module)
        statistics = find_callback(trainer, ExpertCalibration, before=self).collect(trainer, pl_module)
        # Of the channels left; never below 0 where a method rounded up what it removed before.
        ratio_now = max(0.0, 1 - (1 - prune_ratio) * self._num_channels / statistics.shape.num_channels)
        plan = self.method.plan(statistics, prune_ratio=ratio_now)
        for optimizer in trainer.optimizers:
            optimizer.zero_grad(set_to_none=True)
        follow_cut(trainer.optimizers, replaced=apply_plan(model, plan=plan))
        self._keep(plan, trainer=trainer)
        log.info("Step %d: cut to %d of %d channels.", trainer.global_step, plan.num_kept, self._num_channels)

    def _keep(self, plan: PrunePlan, *, trainer: Trainer) -> None:
        self.plans.append(plan)
        if self.save_plan is not None and trainer.is_global_zero:
            plan.save(self.save_plan)


def prunings(trainer: Trainer) -> list[ChannelPruning]:
    """Every ChannelPruning of the trainer's list."""
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, ChannelPruning)]
