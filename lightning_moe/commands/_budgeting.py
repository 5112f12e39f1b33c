"""`plan` from statistics: which channels stay, by a ratio or a budget."""

import json
import logging
from typing import Any

from lightning_moe.allocation import build_method
from lightning_moe.allocation.budgets import Budget, BudgetPlan, spend_budget
from lightning_moe.allocation.meter import shown
from lightning_moe.allocation.methods.presets import MethodArgs
from lightning_moe.allocation.units import parse_bytes, parse_params
from lightning_moe.commands._shared import check_writable, files_of
from lightning_moe.export.apart import check_apart
from lightning_moe.models.loading import DtypeName
from lightning_moe.quantization.size import Bits, ModelSizes, read_sizes
from lightning_moe.records import CalibrationStatistics, PrunePlan
from lightning_moe.reporting.table import Column, format_table

log = logging.getLogger(__name__)

_COLUMNS = (
    Column(key="what", header="", left=True),
    Column(key="before", header="before"),
    Column(key="asked", header="budget"),
    Column(key="left", header="plan"),
    Column(key="binds", header="binds", left=True),
)


def plan_from_statistics(
    *,
    statistics: str,
    out: str,
    prune_ratio: float | None = None,
    keep_ratio: float | None = None,
    budget: str | int | None = None,
    stored_params: str | int | None = None,
    active: float | None = None,
    model: str | None = None,
    bits: Bits = 4,
    dtype: DtypeName = "auto",
    method: str = "exact_global",
    method_args: MethodArgs | None = None,
    corpora: list[str] | None = None,
) -> None:
    """Writes a plan; the arguments are those of `plan`.

    Raises:
        ValueError: no limit is given, one cannot be met, or a setting is refused.
    """
    if all(value is None for value in (prune_ratio, keep_ratio, budget, stored_params, active)):
        raise ValueError(
            "Say how much to cut: `prune_ratio`, `keep_ratio`, `budget`, `stored_params`, `active`, one or several."
        )
    wanted = Budget(
        prune_ratio=prune_ratio,
        keep_ratio=keep_ratio,
        stored_params=None if stored_params is None else parse_params(stored_params),
        bytes=None if budget is None else parse_bytes(budget),
        active=active,
    )
    if wanted.needs_sizes and model is None:
        raise ValueError("`budget` and `stored_params` need `model`, whose config says what is stored. Name the model.")
    sizes = None if model is None else _sizes(model, bits=bits, dtype=dtype, needed=wanted.needs_sizes)
    check_apart(out, inputs=[statistics, model, *files_of(model)], within=False)
    check_writable(out)
    chosen, measured = build_method(method, **(method_args or {})), CalibrationStatistics.load(statistics)
    spent = spend_budget(chosen, measured, budget=wanted, sizes=sizes, corpora=corpora)
    spent.plan.save(out)
    log.info("%s\n%s\nPlan written to %s.", spent.plan.summary(), _table(spent, wanted, sizes=sizes), out)


def noted_budget(plan: PrunePlan) -> dict[str, Any]:
    """What a plan's provenance says of the budget that it was made for; nothing of one without.

    Raises:
        ValueError: it says something else.
    """
    text = plan.provenance.get("budget", "{}")
    try:
        noted = json.loads(text)
    except (ValueError, RecursionError):
        noted = None
    if not isinstance(noted, dict) or not isinstance(noted.get("asked", {}), dict):
        raise ValueError(f"`budget` in the plan's provenance must be a mapping as JSON, got {text[:60]!r}. Plan again.")
    return noted


def _sizes(model: str, *, bits: Bits, dtype: DtypeName, needed: bool) -> ModelSizes | None:
    """Sizes of the model's files; where no budget asks for them, none if they cannot be told."""
    try:
        return read_sizes(model, bits=bits, dtype=dtype)
    except ValueError as error:
        if needed:
            raise
        log.warning("Bytes and parameters are not counted: %s", error)
        return None


def _table(spent: BudgetPlan, budget: Budget, *, sizes: ModelSizes | None) -> str:
    """What was asked, what the plan takes, and which limit keeps it from being larger."""
    rows = [
        {
            "what": name,
            "before": shown(name, spent.before[name]),
            "asked": shown(name, budget.asked[name]) if name in budget.asked else None,
            "left": shown(name, value),
            "binds": "yes" if name in spent.binding else None,
        }
        for name, value in spent.reached.items()
    ]
    table = format_table(rows, columns=_COLUMNS)
    return table if sizes is None else f"{table}\n(bytes and parameters as stored in {sizes.bits} bit)"
