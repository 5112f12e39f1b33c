"""Which callbacks want statistics, and when."""

from abc import abstractmethod

from lightning import Callback


class StatisticsUser(Callback):
    """A callback that decides on statistics: before training, or at steps of it."""

    @property
    @abstractmethod
    def in_training(self) -> bool:
        """Whether it asks at steps of training, and not before."""
