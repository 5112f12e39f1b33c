"""Smoothing of layer losses before they become coverage weights (paper A)."""

# L layers

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

# Huber's usual tuning constant, and the factor that makes a median absolute deviation a standard deviation.
_HUBER, _MAD_TO_STD = 1.345, 1.4826


def _clip(value_L: Tensor) -> Tensor:
    std, mean = torch.std_mean(value_L, correction=0)
    return value_L.clamp(min=mean - std, max=mean + std)


def _sqrt4(value_L: Tensor) -> Tensor:
    for _ in range(4):
        value_L = _clip(value_L.sqrt())
    return value_L


def _log(value_L: Tensor) -> Tensor:
    return torch.log1p(value_L / value_L.mean())


def _huber(value_L: Tensor) -> Tensor:
    median = value_L.quantile(0.5)
    reach = _HUBER * _MAD_TO_STD * (value_L - median).abs().quantile(0.5)
    return value_L.clamp(min=median - reach, max=median + reach)


SMOOTHINGS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "sqrt4": _sqrt4,
    "none": lambda value_L: value_L,
    "sqrt": torch.sqrt,
    "log": _log,
    "huber": _huber,
    "clip": _clip,
}


def check_smoothing(smoothing: str) -> None:
    """Refuses an unknown name.

    Raises:
        ValueError: with the known names.
    """
    if smoothing not in SMOOTHINGS:
        raise ValueError(f"`smoothing` must be one of {list(SMOOTHINGS)}, got {smoothing!r}.")


def smooth(loss_L: Tensor, *, smoothing: str = "sqrt4") -> Tensor:
    """Weights of mean 1 from layer losses.

    `sqrt4` (the published code's default): four times square root, then clamp to mean +- one standard deviation (of the
    layers at hand, without Bessel's correction, so that one layer is legal). `sqrt`: once, no clamp. `clip`: the clamp
    alone, once. `log`: `log(1 + loss / mean)`. `huber`: clamp to median +- 1.345 robust standard deviations. `none`:
    only divided by the mean. The details of `log` and `huber` are ours.

    Args:
        loss_L: Layer losses, not negative, any common unit, float64 [L].
        smoothing: One of the names.

    Returns:
        Weights, float64 [L]; all 1 when every loss is 0.

    Raises:
        ValueError: an unknown name.

    Examples:
        >>> smooth(torch.tensor([1.0, 9.0], dtype=torch.float64), smoothing="sqrt").tolist()  # 1 and 3, over their mean
        [0.5, 1.5]
    """
    check_smoothing(smoothing)
    if not bool(loss_L.any()):
        return torch.ones_like(loss_L)
    weight_L = SMOOTHINGS[smoothing](loss_L)
    return weight_L / weight_L.mean()
