"""Zero-shot tasks, as commands are asked for them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import version
from typing import Any

from transformers import PreTrainedTokenizerBase

from lightning_moe.evaluation.tasks import PlannedTask, evaluate_tasks, plan_tasks

_SEEDS = 2**32  # what every random generator that tasks draw from takes


@dataclass(frozen=True, kw_only=True)
class TaskRequest:
    """Tasks by name or preset, checked before a model is read.

    Args:
        tasks: a list, or names with commas.
        limit: items of each task; None: all.
        seed: of the items and of few-shot examples.
        allow_code_execution: tasks may run programs that the model wrote.

    Raises:
        ValueError: see `plan_tasks`.
    """

    tasks: list[str] | str
    limit: int | None
    seed: int
    allow_code_execution: bool

    def __post_init__(self) -> None:
        if not 0 <= self.seed < _SEEDS:
            raise ValueError(f"`seed` must be from 0 to {_SEEDS - 1}, got {self.seed}.")
        _ = self.planned

    @property
    def names(self) -> list[str]:
        """Of tasks and presets."""
        return self.tasks.split(",") if isinstance(self.tasks, str) else self.tasks

    @cached_property
    def planned(self) -> list[PlannedTask]:
        """The tasks, and where their items come from."""
        return plan_tasks(self.names, limit=self.limit, allow_code_execution=self.allow_code_execution)

    @property
    def decides(self) -> dict[str, Any]:
        """What decides the scores of a model, in plain types."""
        sources = {part: source.source for task in self.planned for part, source in task.parts.items()}
        names = [task.name for task in self.planned]
        return {
            "tasks": names,
            "limit": self.limit,
            "seed": self.seed,
            "lm_eval": version("lm_eval"),
            "sources": sources,
        }

    def scores(self, tokenizer: PreTrainedTokenizerBase) -> Callable[..., Mapping[str, Any]]:
        """Scores of a model by task."""
        return partial(
            evaluate_tasks,
            tokenizer=tokenizer,
            tasks=self.names,
            limit=self.limit,
            seed=self.seed,
            allow_code_execution=self.allow_code_execution,
        )
