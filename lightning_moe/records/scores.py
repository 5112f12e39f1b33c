"""Scores that a criterion gives to channels or experts: the higher, the sooner it is kept."""

# C channels of a layer, E experts

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Self

from torch import Tensor

from lightning_moe.files import digest_of_tensors, read_tensors, write_tensors
from lightning_moe.records.shape import LayerShape, ModelShape
from lightning_moe.records.statistics import check_numbers, check_record

_VERSION = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class _LayerScores(ABC):
    shape: ModelShape
    criterion: str
    scores: tuple[Tensor, ...]

    kind: ClassVar[str]

    @staticmethod
    @abstractmethod
    def _num_scores(layer: LayerShape) -> int: ...

    def __post_init__(self) -> None:
        if len(self.scores) != len(self.shape.layers):
            raise ValueError(
                f"`scores` of {self.criterion} must have {len(self.shape.layers)} layers, got {len(self.scores)}."
            )
        for layer, score in zip(self.shape.layers, self.scores, strict=True):
            what = f"{layer.name}: criterion {self.criterion}"
            check_numbers(score, size=(self._num_scores(layer),), signed=False, what=what)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over every score."""
        return digest_of_tensors({str(index): score for index, score in enumerate(self.scores)})

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file."""
        record = {"kind": self.kind, "version": _VERSION, "criterion": self.criterion, "shape": self.shape.to_dict()}
        tensors = {str(index): score for index, score in enumerate(self.scores)}
        write_tensors(path, tensors, metadata={"record": record})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads what `save` wrote.

        Raises:
            ValueError: the file is missing, broken, or holds something else; the message names the file.
        """
        tensors, metadata = read_tensors(path, what=f"file of {cls.kind}")
        record = check_record(metadata, kind=cls.kind, version=_VERSION, path=path)
        try:
            shape = ModelShape.from_dict(record["shape"])
            scores = tuple(tensors[str(index)] for index in range(len(tensors)))
            return cls(shape=shape, criterion=str(record["criterion"]), scores=scores)
        except (ValueError, KeyError) as error:
            raise ValueError(f"'{path}' does not hold valid {cls.kind}: {error} Write it again.") from error


@dataclass(frozen=True, kw_only=True, eq=False)
class ChannelScores(_LayerScores):
    """One score per channel.

    Args:
        shape: The model that was scored.
        criterion: Name of the criterion.
        scores: Per layer float64 [C], finite and not negative; the unit is the criterion's.

    Raises:
        ValueError: a layer is missing or a score is not such a number; the message names layer and criterion.

    Examples:
        >>> score_C = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
        >>> ChannelScores(shape=shape_of([2, 1]), criterion="wanda", scores=(score_C,)).scores[0].sum().item()
        6.0
    """

    kind: ClassVar[str] = "channel scores"

    @staticmethod
    def _num_scores(layer: LayerShape) -> int:
        return layer.num_channels


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertScores(_LayerScores):
    """One score per expert.

    Args:
        shape: The model that was scored.
        criterion: Name of the criterion.
        scores: Per layer float64 [E], finite and not negative; the unit is the criterion's.

    Raises:
        ValueError: a layer is missing or a score is not such a number; the message names layer and criterion.
    """

    kind: ClassVar[str] = "expert scores"

    @staticmethod
    def _num_scores(layer: LayerShape) -> int:
        return layer.num_experts
