"""Everything the callbacks need of Lightning's strategies, in one file."""

import gc
import inspect
from typing import Any

from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook
from lightning import LightningModule, Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
from lightning.pytorch.strategies.xla import XLAStrategy
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from lightning_moe.calibration.processes import Processes
from lightning_moe.training.checkpoint import restore_structure
from lightning_moe.training.checkpoint_files import COMMAND_LINE_ENTRIES
from lightning_moe.training.module import LanguageModelModule
from lightning_moe.training.node_loading import leave_frozen_alone
from lightning_moe.training.sharding import is_sharded, whole_state

_SUPPORTED = (
    "Supported are one device, `ddp` (also `ddp_find_unused_parameters_true`) and `ModelParallelStrategy` (FSDP2)."
)


def processes(trainer: Trainer) -> Processes:
    """The processes of this run."""
    return Processes(rank=trainer.global_rank, size=trainer.world_size)


def check_strategy(trainer: Trainer, *, scheduled: bool) -> None:
    """Refuses, by name and before the first batch, strategies under which a model cannot be cut or packed.

    Args:
        trainer: the running trainer.
        scheduled: the model is cut during training.

    Raises:
        ValueError: another strategy than one device, DDP and FSDP2, weights that accelerate keeps elsewhere, or cuts
            during training with FSDP2.
    """
    strategy = trainer.strategy
    name = type(strategy).__name__
    _check_placement(trainer.lightning_module)
    if isinstance(strategy, DeepSpeedStrategy):
        raise ValueError(
            f"{name}: DeepSpeed partitions flattened parameters, which 4-bit rows and experts of unequal width do not "
            "survive. Use `ModelParallelStrategy` (FSDP2), which shards them as they are, or `ddp`."
        )
    if isinstance(strategy, FSDPStrategy):
        raise ValueError(
            f"{name}: FSDP1 flattens parameters of one type together, and a packed model has several. Use "
            "`ModelParallelStrategy` (FSDP2)."
        )
    known = isinstance(strategy, SingleDeviceStrategy | DDPStrategy | ModelParallelStrategy)
    if not known or isinstance(strategy, SingleDeviceXLAStrategy | XLAStrategy):
        raise ValueError(f"{name} does not work with models that are cut or packed here. {_SUPPORTED}")
    if isinstance(strategy, DDPStrategy) and strategy._start_method != "popen":
        raise ValueError(
            f"{name} starts its processes by `{strategy._start_method}`, and they cannot hand a cut model back. Use "
            "`ddp` in a script, torchrun, or one device."
        )
    if scheduled and isinstance(strategy, ModelParallelStrategy):
        raise ValueError(
            f"{name} shards parameters before training and does not follow a cut in it. Cut once before training "
            "(`prune_ratio`), or use `ddp` or one device for a schedule."
        )


def check_whole(model: PreTrainedModel) -> None:
    """Refuses a model that somebody sharded before it was cut.

    Raises:
        ValueError: parameters are DTensors already.
    """
    if is_sharded(model):
        raise ValueError(
            "The model is sharded before it could be cut or packed. Build it in `__init__` and shard it in "
            "`configure_model`, which runs after the callbacks' `setup`."
        )


def check_gatherable(trainer: Trainer, pl_module: LightningModule) -> None:
    """Refuses, before training, to export a sharded model that nobody but its owner can build whole again.

    Raises:
        ValueError: `ModelParallelStrategy` with a module that is not ours.
    """
    if isinstance(trainer.strategy, ModelParallelStrategy) and not isinstance(pl_module, LanguageModelModule):
        raise ValueError(
            f"ExportPruned cannot put the sharded model of {type(pl_module).__name__} together. Save a checkpoint with "
            "`save_distributed_checkpoint=False` and export from it in one process, or use `ddp`."
        )
    if isinstance(trainer.strategy, ModelParallelStrategy):
        try:
            inspect.signature(type(pl_module)).bind(**_arguments(pl_module))
        except TypeError as error:
            raise ValueError(
                f"ExportPruned builds the sharded model anew, and {type(pl_module).__name__} cannot be made from its "
                f"`hparams`: {error}. Call `save_hyperparameters()` in its constructor."
            ) from error


def _arguments(pl_module: LightningModule) -> dict[str, Any]:
    """What the module was made with, as far as it was saved and its constructor takes it."""
    parameters = inspect.signature(type(pl_module)).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    saved = {name: value for name, value in pl_module.hparams.items() if name not in COMMAND_LINE_ENTRIES}
    return {name: value for name, value in saved.items() if takes_any or name in parameters}


def gathered(trainer: Trainer, pl_module: LightningModule) -> tuple[PreTrainedModel | None, PeftModel | None]:
    """The model of a sharded module, whole: built anew from its source on the CPU of rank 0, and nothing elsewhere.

    Every process calls it. Also returned is PEFT's model around the adapters, if it has any.
    """
    assert isinstance(pl_module, LanguageModelModule)
    checkpoint: dict[str, Any] = {"state_dict": whole_state(pl_module)}
    if not trainer.is_global_zero:
        return None, None
    pl_module.on_save_checkpoint(checkpoint)
    whole = type(pl_module)(**_arguments(pl_module))
    whole.load_language_model()
    peft_model = restore_structure(checkpoint, model=whole.language_model)
    whole.on_load_checkpoint(checkpoint)
    whole.load_state_dict(checkpoint["state_dict"], strict=whole.strict_loading)
    return whole.language_model.eval(), peft_model


def wrap_again(trainer: Trainer) -> None:
    """After a cut in training: DDP gets a new wrapper around the new parameters, on every process.

    The old wrapper would go on reducing parameters that are gone, and the new ones would drift apart. It is collected
    here, and its hooks with it, also those on parameters that stay. What the strategy was given, such as
    `find_unused_parameters`, `static_graph` or communication hooks, holds for the new wrapper too.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, DDPStrategy):
        return
    assert strategy.lightning_module is not None
    strategy.model = strategy.lightning_module
    leave_frozen_alone(strategy.model, loaded=set())  # a cut makes tensors anew: all are sent
    gc.collect()
    strategy._pl_static_graph_delay_done = False
    strategy.configure_ddp()


def _check_placement(pl_module: nn.Module) -> None:
    """Refuses weights that accelerate keeps on the CPU or disk while the model is on a GPU."""
    for name, module in pl_module.named_modules():
        places: dict[str, object] = vars(module).get("hf_device_map", {})
        away = [part or "all" for part, place in places.items() if str(place) in ("cpu", "disk")]
        in_memory = {str(place) for place in places.values()} == {"cpu"}
        hook = vars(module).get("_hf_hook")
        if (away and not in_memory) or (isinstance(hook, ModelHook) and _offloads(hook)):
            what = f"`device_map` has {away[:3]} on the CPU or disk" if away else f"{type(hook).__name__}"
            raise ValueError(
                f"accelerate offloads '{name}' ({what}): weights that are not here cannot be measured or cut. Load it "
                "without `device_map`; what does not fit whole is cut layer by layer by the `prune` command."
            )


def _offloads(hook: ModelHook) -> bool:
    if isinstance(hook, SequentialHook):
        return any(_offloads(one) for one in hook.hooks)
    return isinstance(hook, AlignDevicesHook) and hook.offload
