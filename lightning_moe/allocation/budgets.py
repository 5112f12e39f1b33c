"""Budgets in the user's own words, and the plan of any method that spends them."""

# E experts of a layer; widths are kept channels per expert

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from lightning_moe.allocation.budget import check_prune_ratio, resolve_prune_ratio
from lightning_moe.allocation.budget_search import BudgetSearch, Found
from lightning_moe.allocation.meter import Meter
from lightning_moe.allocation.methods import PruningMethod
from lightning_moe.quantization.size import ModelSizes
from lightning_moe.records import CalibrationStatistics, PrunePlan


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What may be left of a model: exactly what the user gave. Several limits hold together.

    Args:
        prune_ratio: Share of routed-expert channels that goes at least, in [0, 1).
        keep_ratio: The same in the other word: 1 - `prune_ratio`, in (0, 1].
        stored_params: Parameters of the whole model, embeddings and attention included.
        bytes: Of the folder on disk (tensors and configs), as it is stored.
        active: Share of the routed-expert parameters a token uses on average that stays, in (0, 1]. How often an
            expert is used is counted in the calibration; where whole experts go, the others take over their tokens in
            proportion (an estimate, see `usage.rerouted`).

    Raises:
        ValueError: nothing is given, both words for the ratio are, or a value is out of range.
    """

    prune_ratio: float | None = None
    keep_ratio: float | None = None
    stored_params: int | None = None
    bytes: int | None = None
    active: float | None = None

    def __post_init__(self) -> None:
        if not self.asked:
            raise ValueError(f"A budget needs at least one of {list(asdict(self))}, got none.")
        if self.prune_ratio is not None or self.keep_ratio is not None:
            check_prune_ratio(resolve_prune_ratio(prune_ratio=self.prune_ratio, keep_ratio=self.keep_ratio))
        for name in ("stored_params", "bytes"):
            value = self.asked.get(name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"`{name}` of a budget must be a whole number >= 1, got {value!r}.")
        active = self.active
        if active is not None and (
            isinstance(active, bool) or not isinstance(active, int | float) or not 0 < active <= 1
        ):
            raise ValueError(
                f"`active` must be in (0, 1], got {active!r}. It is the share of the routed-expert parameters a token "
                "uses that stays."
            )

    @property
    def asked(self) -> dict[str, float]:
        """The limits that were given, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def needs_sizes(self) -> bool:
        """Whether the sizes of the model's files must be known."""
        return self.stored_params is not None or self.bytes is not None


@dataclass(frozen=True, kw_only=True, eq=False)
class BudgetPlan:
    """A plan and what became of its budget.

    Args:
        plan: The plan.
        before: What the whole model takes: `prune_ratio`, `keep_ratio`, `active`, and with the sizes of its files
            `stored_params`, `active_params` and `bytes` (packed like the plan's).
        reached: What the plan really takes.
        binding: Limits that the next larger plan would break; none where the whole model fits.
    """

    plan: PrunePlan
    before: Mapping[str, float]
    reached: Mapping[str, float]
    binding: tuple[str, ...]


def spend_budget(
    method: PruningMethod,
    statistics: CalibrationStatistics,
    *,
    budget: Budget,
    sizes: ModelSizes | None = None,
    corpora: Sequence[str] | None = None,
    progress: bool = True,
) -> BudgetPlan:
    """The largest plan within a budget, and what it takes.

    One block more would break a limit; for methods that move in larger steps, one expert or one width more per layer.
    A budget of `active` is not monotone for every method: what a token uses may rise where more is cut, because others
    take over the tokens of an expert that goes. Then, as for `paper_a`, it is the first plan that fits from the whole
    model down, in steps of 1/16 of the model; a larger one may fit between two of them.
    The ratio is searched for, with any method. `exact_global` also decides what a channel costs, unless its
    `usage_weight` is set: under a budget of active parameters blocks are ranked by score over usage (weight 1), and
    under two budgets the smallest weight is taken with which the plan that fills the stored one meets the active one,
    to 1/4096 or one block per layer.

    Args:
        method: Any method.
        statistics: Of the model to prune.
        budget: The limits.
        sizes: Of the same model's files (`quantization.size.read_sizes`), for `stored_params` and `bytes`.
        corpora: Names of the corpora that count, for scores and usage; all when not given.
        progress: Show a bar over the plans that are tried (on a terminal).

    Returns:
        The plan, with the ratio it really has, and what it takes. `budget` in its provenance holds what was asked and
        reached, which limits bind, with `sizes` the `bits` and `dtype` they count in, and `method_ratio`: the ratio
        with which the method makes the same plan again.

    Raises:
        ValueError: no plan is that small (with the smallest number that can be reached), sizes are missing or of
            another model, or the method refuses its settings.
    """
    if budget.needs_sizes and sizes is None:
        raise ValueError(
            "A budget in bytes or stored parameters needs the sizes of the model's files: give `sizes` "
            "(`read_sizes(model, bits=...)`), or a budget as `keep_ratio` or `active`."
        )
    if sizes is not None:
        sizes.check_fits(statistics.shape)
    meter = Meter.of(statistics, sizes=sizes, corpora=corpora)
    search = BudgetSearch(
        method=method,
        statistics=statistics,
        corpora=corpora,
        meter=meter,
        limits=_limits(budget),
        progress=progress,
    )
    found = _exact_ratio(search, budget) if set(budget.asked) <= {"prune_ratio", "keep_ratio"} else search.run()
    return _described(found, budget=budget, meter=meter)


def _limits(budget: Budget) -> dict[str, float]:
    """Upper limits: `keep_ratio` stands for both words of the ratio."""
    limits = budget.asked
    if "prune_ratio" in limits:
        limits["keep_ratio"] = 1 - limits.pop("prune_ratio")
    return limits


def _exact_ratio(search: BudgetSearch, budget: Budget) -> Found:
    """A ratio alone means what it means to the method."""
    ratio = resolve_prune_ratio(prune_ratio=budget.prune_ratio, keep_ratio=budget.keep_ratio)
    plan = search.method.plan(search.statistics, prune_ratio=ratio, corpora=search.corpora)
    return Found(plan=plan, method_ratio=ratio, binding=tuple(budget.asked) if ratio else ())


def _described(found: Found, *, budget: Budget, meter: Meter) -> BudgetPlan:
    plan = found.plan
    reached = meter.measure_all([plan.widths(index) for index in range(len(plan.shape.layers))])
    words = {"keep_ratio": "prune_ratio"} if budget.keep_ratio is None else {}
    binding = tuple(words.get(name, name) for name in found.binding)
    record = {"asked": budget.asked, "reached": reached, "binding": binding, "method_ratio": found.method_ratio}
    if meter.sizes is not None:
        record |= {"bits": meter.sizes.bits, "dtype": str(meter.sizes.expert_dtype).removeprefix("torch.")}
    plan = replace(plan, provenance={**plan.provenance, "budget": json.dumps(record)})
    return BudgetPlan(plan=plan, before=meter.measure_all(meter.whole), reached=reached, binding=binding)
