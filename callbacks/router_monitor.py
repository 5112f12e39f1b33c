"""RouterMonitor: what the routers do, in training and on held-out text before and after it."""

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import override

from callbacks._loaders import Loaders, given_validation_loaders, text_data
from callbacks._pruning import Pruning
from callbacks._trainer import callbacks_of, is_first_setup, language_model, state_key_of
from lightning_moe.evaluation.routing import LayerRouting, RoutingMeter, RoutingTable, measure_routing, routing_scalars
from lightning_moe.files import write_atomically, write_json
from lightning_moe.reporting.figures import entropy_depth, png_bytes


class RouterMonitor(Callback):
    """Measures load, entropy and dead experts of every layer's router; works on any transformers MoE in the module.

    In training, `router/entropy` (mean over layers, share of its maximum), `router/dead_experts` (without a token in
    this step, all layers) and `router/max_load` (largest load over mean load) go to the trainer's loggers. Before the
    first step and after the last one the validation text runs through the model, whatever `limit_val_batches` is.

    Args:
        folder: Where `router.json` (both tables, by corpus and layer) and the figure `router.png` (entropy over depth,
            before and after) are written; null: held-out text is not measured.
        every_n_steps: Optimizer steps between two measurements in training.
        num_batches: Batches of each validation corpus; null: all.
        per_layer: Log each layer's own numbers too, as `router/entropy/<layer>` and so on.
    """

    def __init__(
        self,
        *,
        folder: str | None = None,
        every_n_steps: int = 50,
        num_batches: int | None = None,
        per_layer: bool = False,
    ) -> None:
        for name, value in {"every_n_steps": every_n_steps, "num_batches": num_batches}.items():
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        self.folder = None if folder is None else Path(folder)
        self.every_n_steps = every_n_steps
        self.num_batches = num_batches
        self.per_layer = per_layer
        self.before: RoutingTable | None = None
        self.after: RoutingTable | None = None
        self._model: PreTrainedModel | None = None
        self._next_step = 0
        self._step_meter: RoutingMeter | None = None
        self._hooks = ExitStack()

    @property
    def state_key(self) -> str:
        """Two monitors in one trainer keep their states apart."""
        return state_key_of(self, folder=str(self.folder), every_n_steps=self.every_n_steps)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks the order of the list: a cut must be over when a batch begins to be measured."""
        model = language_model(pl_module)
        is_first_setup(self, model=model, done=self._model)
        self._model = model
        callbacks = callbacks_of(trainer)
        for callback in callbacks[callbacks.index(self) :]:
            if isinstance(callback, Pruning):
                raise ValueError(f"{type(callback).__name__} must stand before RouterMonitor in `trainer.callbacks`.")

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The table before training, unless a checkpoint has brought it along."""
        if self.folder is not None and self.before is None:
            self.before = self._measure(trainer, pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Watches the batches of every n-th optimizer step."""
        if trainer.global_step < self._next_step:
            return
        model = language_model(pl_module)
        if self._step_meter is None:
            self._step_meter = RoutingMeter(model)
        self._hooks = self._step_meter.watch(model)

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Gradient checkpointing runs layers again from here on: they are not to be counted twice."""
        self._hooks.close()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs when the optimizer has stepped, over all batches of the step."""
        self._hooks.close()
        if self._step_meter is None or trainer.global_step <= self._next_step:
            return
        layers = self._compute(self._step_meter, trainer=trainer)
        self._step_meter = None
        self._next_step = trainer.global_step - 1 + self.every_n_steps
        self._log(routing_scalars(layers, per_layer=self.per_layer), trainer=trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The table after training, and the files."""
        if self.folder is not None and self.before is not None:
            self.after = self._measure(trainer, pl_module)
            if trainer.is_global_zero:
                _write(self.folder, before=self.before, after=self.after)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leaves no hook behind."""
        self._hooks.close()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leaves no hook behind, and gives up what was begun."""
        self._hooks.close()
        self._step_meter = None

    @override
    def state_dict(self) -> dict[str, Any]:
        """The tables, and when to measure next."""
        tables = {"before": self.before, "after": self.after}
        return {name: table and table.to_dict() for name, table in tables.items()} | {"next_step": self._next_step}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """A resumed run compares with the table of the run that began."""
        tables = {name: state_dict[name] and RoutingTable.from_dict(state_dict[name]) for name in ("before", "after")}
        self.before, self.after = tables["before"], tables["after"]
        self._next_step = int(state_dict["next_step"])

    def _compute(self, meter: RoutingMeter, *, trainer: Trainer) -> tuple[LayerRouting, ...]:
        return meter.compute(reduce=partial(_sum_over_ranks, trainer))

    def _log(self, scalars: dict[str, float], *, trainer: Trainer) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=trainer.global_step)

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> RoutingTable:
        """Our own validation text is read whole by each process; that of others is shared out as their loaders do."""
        ours = text_data(trainer) is not None
        with isolate_rng(), trainer.precision_plugin.val_step_context():
            return measure_routing(
                language_model(pl_module),
                loaders=_held_out(trainer),
                num_batches=self.num_batches,
                step=trainer.global_step,
                reduce=None if ours else partial(_sum_over_ranks, trainer),
            )


def _held_out(trainer: Trainer) -> Loaders:
    """Our validation corpora by name, somebody else's validation loaders by number.

    Raises:
        ValueError: there are none.
    """
    data, given = text_data(trainer), given_validation_loaders(trainer)
    if data is not None and data.validation_names:
        return data.validation_dataloaders()
    if data is not None or given is None:
        raise ValueError(
            "RouterMonitor measures held-out text before and after training: give validation corpora or loaders (and "
            "`limit_val_batches` above 0), or `folder: null` to log what happens in training only."
        )
    return {str(index): loader for index, loader in enumerate(given if isinstance(given, list | tuple) else [given])}


def _sum_over_ranks(trainer: Trainer, value: Tensor) -> Tensor:
    total: Any = trainer.strategy.reduce(value.to(trainer.strategy.root_device), reduce_op="sum")
    return total


def _write(folder: Path, *, before: RoutingTable, after: RoutingTable) -> None:
    write_json(folder / "router.json", {"before": before.to_dict(), "after": after.to_dict()})
    labels = (f"before (step {before.step})", f"after (step {after.step})")
    figure = entropy_depth(before.entropies(), after=after.entropies(), labels=labels)
    with write_atomically(folder / "router.png") as temporary:
        temporary.write_bytes(png_bytes(figure))
