"""Searches the ratio, and what a channel costs, so that a method's plan spends a budget and stays within it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NoReturn

from tqdm.auto import tqdm

from lightning_moe.allocation.budget import resolve_align, whole_blocks
from lightning_moe.allocation.meter import Meter, shown
from lightning_moe.allocation.methods import ExactGlobal, ExpertMethod, PruningMethod
from lightning_moe.allocation.search import largest_within
from lightning_moe.progress import hidden
from lightning_moe.quantization.size import Widths
from lightning_moe.records import CalibrationStatistics, PrunePlan

_WEIGHT_STEPS = 4096
_SCAN = 16
_ROUNDING = 1e-12  # of a limit: ratios are not exact numbers
_LOWER = "lower `align` or a floor of the method"
_WHOLE = (
    "take a method that cuts channels: where experts are equally wide and all of them whole, a token uses as many "
    "channels as before"
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """The plan that was found, the ratio its method was given, and the limits that the next larger one would break."""

    plan: PrunePlan
    method_ratio: float
    binding: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Filled:
    """The largest number of blocks within some limits, and the smallest found to be over them."""

    num_blocks: int
    over: int


class BudgetSearch:
    """One search. Every plan is made once; of those that are not chosen only the widths are kept.

    Args:
        method: Whose plans are tried.
        statistics: What they are made from.
        corpora: Those that count.
        meter: Measures a plan's widths.
        limits: Name of a measure -> its upper limit.
        progress: Show a bar over the plans (on a terminal).
    """

    def __init__(
        self,
        *,
        method: PruningMethod,
        statistics: CalibrationStatistics,
        corpora: Sequence[str] | None,
        meter: Meter,
        limits: Mapping[str, float],
        progress: bool,
    ) -> None:
        self.method = method
        self.statistics = statistics
        self.corpora = corpora
        self.meter = meter
        self.limits = limits
        self.align = resolve_align(method.align, shape=statistics.shape)
        self._bar = tqdm(desc="Searching the budget", unit=" plans", disable=hidden(progress=progress))
        self._tried: dict[tuple[int, float | None], Widths | None] = {}
        self._last: int | None = None

    @property
    def highest(self) -> int:
        """Blocks of the largest plan that removes something."""
        shape = self.statistics.shape
        num_blocks = sum(whole_blocks(layer, align=self.align) for layer in shape.layers)
        return num_blocks if num_blocks * self.align < shape.num_channels else num_blocks - 1

    def run(self) -> Found:
        """Spends the limits.

        Raises:
            ValueError: no plan meets them, or the method refuses its settings.
        """
        self._check_possible()
        with self._bar:
            if not self._broken(self.meter.whole):
                whole = self.method.plan(self.statistics, prune_ratio=0.0, corpora=self.corpora)
                return Found(plan=whole, method_ratio=0.0, binding=())
            may_weigh = isinstance(self.method, ExactGlobal) and self.method.usage_weight is None
            if may_weigh and "active" in self.limits:
                return self._balance(tuple(name for name in self.limits if name != "active"))
            return self._found(self._fill(tuple(self.limits), weight=None), weight=None)

    def _check_possible(self) -> None:
        """Refuses, before any plan is made, what no plan of blocks of this size can meet."""
        least = self.meter.least(align=self.align)
        for name in self._broken(least):
            raise ValueError(
                f"No plan keeps {name} within {shown(name, self.limits[name])}: with one block of `align`={self.align} "
                f"channels in each expert that a token needs it is {shown(name, self.meter.measure(name, least))}. "
                f"{self._advice(name)}"
            )

    def _advice(self, name: str) -> str:
        if isinstance(self.method, ExpertMethod):
            return f"Ask for more, or {_WHOLE}." if name == "active" else "Ask for more, or cut channels instead."
        wide = name == "bytes" and self.meter.sizes is not None and self.meter.sizes.bits == 16
        return f"Ask for more, {'count in 4 bit (`bits` 4), ' if wide else ''}or {_LOWER}."

    def _balance(self, stored: tuple[str, ...]) -> Found:
        """The smallest `usage_weight` that spends every limit; 1 where only `active` binds."""
        if not stored or self._active_excess(0, stored=stored) > 0:
            return self._found(self._fill(tuple(self.limits), weight=1.0), weight=1.0)
        if self._active_excess(_WEIGHT_STEPS, stored=stored) <= 0:
            return self._found(self._fill(stored, weight=0.0), weight=0.0)
        one_block = self.align / self.statistics.shape.num_channels
        steps, _ = largest_within(
            partial(self._active_excess, stored=stored),
            highest=_WEIGHT_STEPS,
            origin=self._active_excess(0, stored=stored),
            enough=one_block / self.limits["active"],
        )
        weight = _weight(steps or 0)
        found = self._found(self._fill(stored, weight=weight), weight=weight)
        return replace(found, binding=tuple(dict.fromkeys((*found.binding, "active"))))

    def _active_excess(self, steps: int, *, stored: tuple[str, ...]) -> float:
        """How far the plan that fills the other limits is over the active one, `steps` below weight 1."""
        weight = _weight(steps)
        excess = self._excess(self._fill(stored, weight=weight).num_blocks, names=("active",), weight=weight)
        assert excess is not None
        return excess

    def _fill(self, names: tuple[str, ...], *, weight: float | None) -> _Filled:
        """The largest plan within some of the limits."""
        excess = partial(self._excess, names=names, weight=weight)
        if (excess(self.highest) or 0) <= 0:
            return _Filled(num_blocks=self.highest, over=self.highest + 1)
        if "active" in names:
            low, high = self._bracket(names, weight=weight)
        else:
            low, high = 0, self.highest
        origin = self._least_excess(names) if low == 0 else excess(low) or 0.0
        start = None if self._last is None or low else self._last
        best, over = largest_within(lambda n: excess(low + n), highest=high - low, origin=origin, start=start)
        if best is None and low == 0:
            self._refuse(over, names=names, weight=weight)
        num_blocks = low + (best or 0)
        if "active" not in names:
            self._last = num_blocks
        return _Filled(num_blocks=num_blocks, over=low + over)

    def _bracket(self, names: tuple[str, ...], *, weight: float | None) -> tuple[int, int]:
        """Numbers of blocks between which the limits are met for the first time from above, to 1/16 of the model.

        What a token uses may rise where more goes: another expert takes over the tokens of one that is gone.
        """
        high, step = self.highest, -(-self.highest // _SCAN)
        while high > step:
            excess = self._excess(high - step, names=names, weight=weight)
            if excess is None:
                break
            if excess <= 0:
                return high - step, high
            high -= step
        return 0, high

    def _least_excess(self, names: tuple[str, ...]) -> float:
        least = self.meter.least(align=self.align)
        return max(self.meter.measure(name, least) / self.limits[name] - 1 for name in names)

    def _refuse(self, smallest: int, *, names: tuple[str, ...], weight: float | None) -> NoReturn:
        widths = self._widths(smallest, weight)
        assert widths is not None
        name = max(names, key=lambda name: self.meter.measure(name, widths) / self.limits[name])
        raise ValueError(
            f"No plan of '{self.method.name}' keeps {name} within {shown(name, self.limits[name])}: its smallest one "
            f"has {shown(name, self.meter.measure(name, widths))} (`align`={self.align}, experts that a token needs, "
            f"floors). {self._advice(name)}"
        )

    def _found(self, filled: _Filled, *, weight: float | None) -> Found:
        plan = self._plan(filled.num_blocks, weight)
        larger = self.meter.whole if filled.over > self.highest else self._widths(filled.over, weight)
        return Found(
            plan=replace(plan, prune_ratio=plan.achieved_prune_ratio),
            method_ratio=plan.prune_ratio,
            binding=self._broken(larger) if larger is not None else (),
        )

    def _excess(self, num_blocks: int, *, names: tuple[str, ...], weight: float | None) -> float | None:
        """By which share of a limit the plan is over it, at most; None where the method makes no plan that small."""
        widths = self._widths(num_blocks, weight)
        if widths is None:
            return None
        return max(self.meter.measure(name, widths) / self.limits[name] - 1 - _ROUNDING for name in names)

    def _broken(self, widths: Widths) -> tuple[str, ...]:
        """Names of the limits that these widths break."""
        return tuple(n for n, limit in self.limits.items() if self.meter.measure(n, widths) > limit * (1 + _ROUNDING))

    def _widths(self, num_blocks: int, weight: float | None) -> Widths | None:
        key = (num_blocks, weight)
        if key not in self._tried:
            try:
                plan = self._plan(num_blocks, weight)
                self._tried[key] = [plan.widths(index) for index in range(len(plan.shape.layers))]
            except ValueError:
                if num_blocks == self.highest:
                    raise  # nothing to do with the budget
                self._tried[key] = None
        return self._tried[key]

    def _plan(self, num_blocks: int, weight: float | None) -> PrunePlan:
        ratio = 1 - num_blocks * self.align / self.statistics.shape.num_channels
        method = self.method
        if weight is not None:
            assert isinstance(method, ExactGlobal)
            method = replace(method, usage_weight=weight)
        self._bar.update()
        return method.plan(self.statistics, prune_ratio=ratio, corpora=self.corpora)


def _weight(steps: int) -> float:
    """`usage_weight` so many steps below 1."""
    return 1 - steps / _WEIGHT_STEPS
