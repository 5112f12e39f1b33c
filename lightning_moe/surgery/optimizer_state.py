"""Carry an optimizer across a cut: same object, same groups, the state of what stays."""

from collections.abc import Iterable, Sequence

import torch
from accelerate.optimizer import AcceleratedOptimizer
from bitsandbytes.optim.optimizer import Optimizer1State, Optimizer2State, Optimizer8bit
from torch.optim import LBFGS, Adafactor, Optimizer, SparseAdam
from transformers.optimization import Adafactor as HuggingFaceAdafactor

from lightning_moe.models.selection import RowSelection

_ADVICE = "Use an optimizer that keeps one number per weight, such as `torch.optim.AdamW`."


def check_optimizers(optimizers: Iterable[Optimizer]) -> None:
    """Refuses, before training, optimizers that are known not to be able to follow a cut.

    Raises:
        ValueError: with the optimizer's name and the reason.
    """
    for optimizer in map(unwrapped, optimizers):
        reason = _refusal(optimizer)
        if reason is not None:
            raise ValueError(
                f"{type(optimizer).__name__} cannot follow a cut during training: it keeps {reason}. {_ADVICE}"
            )


def _refusal(optimizer: Optimizer) -> str | None:
    """What an optimizer keeps that cannot be cut row by row."""
    match optimizer:
        case Adafactor() | HuggingFaceAdafactor():
            return "sums over rows and columns"
        case LBFGS():
            return "a history of all weights in one vector"
        case SparseAdam():
            return "moments of sparse gradients"
        case Optimizer8bit() if optimizer.is_paged:
            return "its state in paged memory"
        case Optimizer1State() | Optimizer2State() if vars(optimizer.args)["optim_bits"] != 32:
            return "its state in 8 bit, in blocks across rows"
        case _:
            return None


def check_states(optimizers: Iterable[Optimizer], *, parameters: Iterable[torch.nn.Parameter]) -> None:
    """Refuses, before a cut, a state of these parameters whose rows cannot be told apart.

    Raises:
        ValueError: with the names of optimizer and state and their shapes.
    """
    parameters = list(parameters)
    for optimizer in map(unwrapped, optimizers):
        for parameter in parameters:
            for key, value in optimizer.state.get(parameter, {}).items():
                if not _has_rows(value, parameter) and not _is_number(value):
                    shape = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
                    raise ValueError(
                        f"{type(optimizer).__name__}'s state '{key}' has shape {shape} for a parameter of "
                        f"{tuple(parameter.shape)}: it cannot follow a cut during training. {_ADVICE}"
                    )


def follow_cut(optimizers: Iterable[Optimizer], *, replaced: Sequence[RowSelection]) -> None:
    """Swaps cut parameters inside their groups and selects the same rows of their state (Adam's moments, say).

    State of the parameter's own shape is cut like the parameter; single numbers (the step count) are kept. Gradients of
    the old parameters are dropped: call it between steps.

    Raises:
        ValueError: a state of another shape, whose rows cannot be told apart (8-bit or factored moments).
    """
    optimizers = list(map(unwrapped, optimizers))
    check_states(optimizers, parameters=(selection.old for selection in replaced))
    by_old = {id(selection.old): selection for selection in replaced}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [by_old[id(p)].new if id(p) in by_old else p for p in group["params"]]
        for selection in replaced:
            state = optimizer.state.pop(selection.old, None)
            if state is not None:
                optimizer.state[selection.new] = {
                    key: _cut(value, selection) if _has_rows(value, selection.old) else value
                    for key, value in state.items()
                }


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer itself, out of accelerate's wrapper."""
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


def _has_rows(value: object, parameter: torch.nn.Parameter) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == parameter.shape


def _is_number(value: object) -> bool:
    """A single number, as a tensor or not, or nothing."""
    if isinstance(value, torch.Tensor):
        return value.numel() == 1
    return value is None or isinstance(value, bool | int | float)


def _cut(value: torch.Tensor, selection: RowSelection) -> torch.Tensor:
    return value.index_select(selection.dim, selection.index.to(value.device))
