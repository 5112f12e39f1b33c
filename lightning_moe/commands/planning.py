"""The command `plan`."""

import logging
from typing import Any

from lightning_moe.allocation import build_method
from lightning_moe.allocation.budget import resolve_prune_ratio
from lightning_moe.records import CalibrationStatistics

log = logging.getLogger(__name__)


def plan(
    *,
    statistics: str,
    out: str,
    prune_ratio: float | None = None,
    keep_ratio: float | None = None,
    method: str = "exact_global",
    method_args: dict[str, Any] | None = None,
    corpora: list[str] | None = None,
) -> None:
    """Decide which channels stay; reads a statistics file, writes a plan (JSON), needs no model.

    Args:
        statistics: File written by `calibrate`.
        out: Plan to write.
        prune_ratio: Share of routed-expert channels to remove, in [0, 1). Exactly one of this and `keep_ratio`.
        keep_ratio: Share that stays, in (0, 1]: 1 - `prune_ratio`.
        method: `exact_global` (ours), `paper_a`, `uniform` or `reap`.
        method_args: Settings of the method, for example `{align: 64}`.
        corpora: Corpora that count; all of the file if not given.
    """
    ratio = resolve_prune_ratio(prune_ratio=prune_ratio, keep_ratio=keep_ratio)
    made = build_method(method, **(method_args or {})).plan(
        CalibrationStatistics.load(statistics), prune_ratio=ratio, corpora=corpora
    )
    made.save(out)
    log.info("%s\nPlan written to %s.", made.summary(), out)
