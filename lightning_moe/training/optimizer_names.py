"""Optimizer states of a checkpoint by the parameters' names, so that any number of processes can go on with them."""

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_moe.training.sharding import is_sharded


def name_optimizer_states(checkpoint: dict[str, Any], *, module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Puts names in the place of numbers; does nothing where there are names already.

    Numbers mean the order in the optimizer's groups, but under Lightning's FSDP2 that among all parameters of the
    module, so neither kind of run reads the other's. Names are read by both: PyTorch goes by the order of the groups
    whatever the keys are, and FSDP2 takes names as they are.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    everything = list(names.values())
    for index, optimizer in enumerate(optimizers):
        state = checkpoint.get("optimizer_states", [])[index : index + 1]
        if not state or not state[0] or not all(isinstance(key, int) for key in state[0]["state"]):
            continue
        ordered = [names.get(id(parameter)) for group in optimizer.param_groups for parameter in group["params"]]
        if None not in ordered:
            _rekey(state[0], everything if is_sharded(module) else ordered)


def _rekey(state: dict[str, Any], names: Sequence[str | None]) -> None:
    state["state"] = {names[number]: value for number, value in state["state"].items()}
    state["param_groups"] = [
        group | {"params": [names[number] for number in group["params"]]} for group in state["param_groups"]
    ]
