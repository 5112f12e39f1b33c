"""Carry an optimizer across a cut: same object, same groups, the state of what stays."""

from collections.abc import Iterable, Sequence

import torch
from torch.optim import Optimizer

from lightning_moe.surgery.cut import RowSelection


def follow_cut(optimizers: Iterable[Optimizer], *, replaced: Sequence[RowSelection]) -> None:
    """Swaps cut parameters inside their groups and selects the same rows of their state (Adam's moments, say).

    State of the parameter's own shape is cut like the parameter; single numbers (the step count) are kept. Gradients of
    the old parameters are dropped: call it between steps.

    Raises:
        ValueError: a state of another shape, whose rows cannot be told apart (8-bit or factored moments).
    """
    by_old = {id(selection.old): selection for selection in replaced}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [by_old[id(p)].new if id(p) in by_old else p for p in group["params"]]
        for selection in replaced:
            state = optimizer.state.pop(selection.old, None)
            if state is not None:
                name = type(optimizer).__name__
                optimizer.state[selection.new] = {
                    key: _cut(value, selection, what=f"{name}'s state '{key}'") for key, value in state.items()
                }


def _cut(value: object, selection: RowSelection, *, what: str) -> object:
    if not isinstance(value, torch.Tensor) or value.numel() == 1:
        return value
    if value.shape != selection.old.shape:
        raise ValueError(
            f"{what} has shape {tuple(value.shape)} for a parameter of {tuple(selection.old.shape)}: it cannot follow "
            "a cut during training. Use an optimizer that keeps one number per weight, such as `torch.optim.AdamW`."
        )
    return value.index_select(selection.dim, selection.index.to(value.device))
