"""Settings of a training run that both modules share, refused before anything is loaded."""

import math
from dataclasses import dataclass

from lightning_moe.models.loading import DtypeName
from lightning_moe.training.optim import OptimizerName, ScheduleName, check_optimizer, check_schedule


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """See `LanguageModelModule`.

    Raises:
        ValueError: an unknown name, or a number that no training can have: NaN, infinite, negative, a decay rate of 1.
    """

    dtype: DtypeName
    optimizer: OptimizerName
    weight_decay: float
    betas: tuple[float, float]
    schedule: ScheduleName
    warmup_ratio: float
    router_loss: float
    gradient_checkpointing: bool

    def __post_init__(self) -> None:
        check_optimizer(self.optimizer)
        check_schedule(self.schedule, warmup_ratio=self.warmup_ratio)
        check_rates(weight_decay=self.weight_decay, router_loss=self.router_loss)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"`betas` are two decay rates in [0, 1), such as [0.9, 0.999], got {list(self.betas)}.")


def check_rates(**rates: float) -> None:
    """Refuses learning rates and coefficients that are not finite numbers >= 0.

    Raises:
        ValueError: with name and value.

    Examples:
        >>> check_rates(weight_decay=-0.1)
        Traceback (most recent call last):
        ValueError: `weight_decay` must be a finite number, 0 or more, got -0.1.
    """
    for name, rate in rates.items():
        if not math.isfinite(rate) or rate < 0:
            raise ValueError(f"`{name}` must be a finite number, 0 or more, got {rate}.")
