"""One summary of many rows."""

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning_moe.evaluation.stages import Stage, load_stages
from lightning_moe.files import read_json

_PACKAGES = ("torch", "lightning", "transformers", "peft", "bitsandbytes", "datasets", "torchmetrics", "jsonargparse")


def summarise(folder: str | Path, *, control: str = "control") -> dict[str, Any]:
    """Rows below `<folder>/stages` as one record.

    Args:
        folder: folder of results.
        control: name of the row of the unpruned model given the same recovery; it and its exports stand apart.

    Returns:
        `dense`, `stages` (a list), `control`, `exports`, `recovery` (percent of the one-shot gap that each recovered
        row closed, against the control, and with domain adaptation taken out), `versions`. `dense` and `control` are
        null where there is no such row.

    Raises:
        ValueError: there are no rows.
    """
    rows = load_stages(folder)
    apart = ("dense", control)
    stages = [row for name, row in rows.items() if name not in apart and not name.startswith(f"{control}_")]
    exports = [row for file in sorted(Path(folder).glob("stages/*.exports.json")) for row in _exports(file)]
    return {
        "dense": rows.get("dense"),
        "stages": sorted(stages, key=lambda row: (row["prune_ratio"], row["name"])),
        "control": rows.get(control),
        "exports": exports,
        "recovery": {
            "gap_closed_percent": _percent(recovered_share(rows, before=control, after=control)),
            "gap_closed_percent_without_adaptation": _percent(recovered_share(rows, before="dense_nf4", after=control)),
        },
        "versions": {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()},
    }


def _exports(file: Path) -> list[Any]:
    rows = read_json(file, what="list of exports")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"'{file}' must be a list of exports, got {type(rows).__name__}. Delete it, or export again.")
    return rows


def recovered_share(rows: dict[str, Stage], *, before: str, after: str) -> dict[str, float]:
    """Share of the one-shot gap that recovery closed, for each `recovered_X` with a one-shot row `cut_X`.

    `1 - (recovered - after) / (cut - before)`. With the control on both sides it is the share of the way from the cut
    model to the control. With `before` the untrained NF4 model, what training teaches an unpruned model too cancels.
    Rows trained for another number of steps than the control, or whose cut lost nothing, are left out.

    Args:
        rows: rows by name.
        before: the unpruned row that the cut is held against.
        after: the unpruned row that the recovered model is held against (the control).
    """
    if before not in rows or after not in rows:
        return {}
    shares = {}
    for name, row in rows.items():
        cut = rows.get(name.replace("recovered_", "cut_"))
        same_steps = row.get("steps") == rows[after].get("steps")
        if name.startswith("recovered_") and cut is not None and same_steps:
            gap = cut["nll"] - rows[before]["nll"]
            if gap > 0:
                shares[name] = 1 - (row["nll"] - rows[after]["nll"]) / gap
    return shares


def _percent(shares: dict[str, float]) -> dict[str, float]:
    return {name: round(100 * share, 2) for name, share in shares.items()}
