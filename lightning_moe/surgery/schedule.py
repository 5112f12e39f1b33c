"""When to cut: a validated list of (step, prune_ratio), given as such or as the shape of a curve."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal, get_args

from lightning_moe.allocation.budget import check_count

Shape = Literal["linear", "cubic"]
_POWERS: dict[Shape, int] = {"linear": 1, "cubic": 3}


@dataclass(frozen=True, kw_only=True)
class PruneSchedule:
    """Cuts during training.

    Args:
        cuts: (optimizer step, share of the *unpruned* model's channels removed from then on), both ascending.

    Raises:
        ValueError: not pairs of a whole number and a number, empty, not ascending, or a ratio outside (0, 1).
    """

    cuts: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        _check_pairs(self.cuts)
        steps, ratios = [step for step, _ in self.cuts], [ratio for _, ratio in self.cuts]
        if not self.cuts or steps != sorted(set(steps)) or ratios != sorted(set(ratios)):
            raise ValueError(f"`schedule` must be [step, prune_ratio] pairs, both strictly ascending, got {self.cuts}.")
        if steps[0] < 0 or not all(0 < ratio < 1 for ratio in ratios):
            raise ValueError(f"`schedule` needs steps >= 0 and prune ratios inside (0, 1), got {self.cuts}.")

    @property
    def prune_ratio(self) -> float:
        """The ratio after the last cut."""
        return self.cuts[-1][1]

    def due(self, *, step: int, num_done: int) -> tuple[int, float] | None:
        """(cuts done after this one, its prune ratio) if one is due at `step`, else None; overdue ones are skipped.

        Examples:
            >>> schedule = PruneSchedule(cuts=((10, 0.25), (20, 0.5)))
            >>> schedule.due(step=9, num_done=0), schedule.due(step=12, num_done=0), schedule.due(step=25, num_done=1)
            (None, (1, 0.25), (2, 0.5))
        """
        reached = [index for index, (at, _) in enumerate(self.cuts) if at <= step]
        if not reached or reached[-1] < num_done:
            return None
        return reached[-1] + 1, self.cuts[reached[-1]][1]


@dataclass(frozen=True, kw_only=True)
class GradualSchedule:
    """Cuts along a curve that starts at 0 at step `begin` and reaches `prune_ratio` at step `end`.

    With `x = (step - begin) / (end - begin)` the ratio is `prune_ratio * x` (linear) or `prune_ratio * (1 - (1 - x)^3)`
    (cubic: Zhu & Gupta 2017, arXiv 1710.01878, which cuts much while much is redundant). The cuts stand at equal
    distances behind `begin`, rounded to steps; the last one is at `end` and reaches the ratio exactly.

    Args:
        shape: `linear` or `cubic`.
        begin: Optimizer step at which the curve starts; nothing is cut there yet.
        end: Optimizer step of the last cut.
        num_cuts: Number of cuts.
        prune_ratio: Share of the unpruned model's channels that is gone after the last cut, in (0, 1).

    Raises:
        ValueError: an unknown shape, no room for so many cuts, or a ratio outside (0, 1).
    """

    shape: Shape
    begin: int
    end: int
    num_cuts: int
    prune_ratio: float

    def __post_init__(self) -> None:
        if self.shape not in get_args(Shape):
            raise ValueError(f"`shape` of a schedule must be one of {get_args(Shape)}, got {self.shape!r}.")
        check_count(self.begin, name="begin", lowest=0)
        check_count(self.num_cuts, name="num_cuts", lowest=1)
        check_count(self.end, name="end", lowest=self.begin + self.num_cuts)
        if isinstance(self.prune_ratio, bool) or not 0 < self.prune_ratio < 1:
            raise ValueError(f"`prune_ratio` of a schedule must be inside (0, 1), got {self.prune_ratio!r}.")

    def to_cuts(self) -> PruneSchedule:
        """The steps and ratios of the cuts.

        Examples:
            >>> curve = GradualSchedule(shape="cubic", begin=0, end=8, num_cuts=2, prune_ratio=0.5)
            >>> curve.to_cuts().cuts  # half-way 0.5 * (1 - 0.5^3)
            ((4, 0.4375), (8, 0.5))
        """
        length = self.end - self.begin
        steps = [self.begin + round(cut * length / self.num_cuts) for cut in range(1, self.num_cuts + 1)]
        left = [1 - (step - self.begin) / length for step in steps]
        power = _POWERS[self.shape]
        return PruneSchedule(
            cuts=tuple((step, self.prune_ratio * (1 - x**power)) for step, x in zip(steps, left, strict=True))
        )


Schedule = PruneSchedule | GradualSchedule | Sequence[tuple[int, float]]


def build_schedule(schedule: Schedule) -> PruneSchedule:
    """A schedule from pairs or from a curve; a PruneSchedule passes through.

    Raises:
        ValueError: not pairs of a step and a ratio, or see the two classes.
    """
    if isinstance(schedule, PruneSchedule):
        return schedule
    if isinstance(schedule, GradualSchedule):
        return schedule.to_cuts()
    _check_pairs(schedule)
    return PruneSchedule(cuts=tuple((int(step), float(ratio)) for step, ratio in schedule))


def _check_pairs(schedule: object) -> None:
    if not isinstance(schedule, Sequence) or not all(_is_cut(pair) for pair in schedule):
        raise ValueError(
            f"`schedule` must be [step, prune_ratio] pairs, got {schedule!r}: a whole number and a number each."
        )


def _is_cut(pair: object) -> bool:
    if not isinstance(pair, Sequence) or len(pair) != 2 or any(isinstance(value, bool) for value in pair):
        return False
    return isinstance(pair[0], Integral) and isinstance(pair[1], Real)
