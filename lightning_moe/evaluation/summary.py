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
        row closed), `versions`. `dense` and `control` are null where there is no such row.

    Raises:
        ValueError: there are no rows.
    """
    rows = load_stages(folder)
    apart = ("dense", control)
    stages = [row for name, row in rows.items() if name not in apart and not name.startswith(f"{control}_")]
    exports = [
        result
        for file in sorted(Path(folder).glob("stages/*.exports.json"))
        for result in read_json(file, what="list of exports")
    ]
    shares = recovered_share(rows, control=control)
    return {
        "dense": rows.get("dense"),
        "stages": sorted(stages, key=lambda row: (row["prune_ratio"], row["name"])),
        "control": rows.get(control),
        "exports": exports,
        "recovery": {"gap_closed_percent": {name: round(100 * share, 2) for name, share in shares.items()}},
        "versions": {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()},
    }


def recovered_share(rows: dict[str, Stage], *, control: str) -> dict[str, float]:
    """Share of the one-shot gap that recovery closed, for each `recovered_X` with a one-shot row `cut_X`.

    Both gaps are to an unpruned NF4 model that had the same training: before, to the untrained one (`dense_nf4`);
    after, to the control. `1 - (recovered - control) / (cut - dense_nf4)`; domain adaptation cancels. Rows whose cut
    lost nothing have no gap and are left out.
    """
    if control not in rows or "dense_nf4" not in rows:
        return {}
    shares = {}
    for name, row in rows.items():
        cut = rows.get(name.replace("recovered_", "cut_"))
        if name.startswith("recovered_") and cut is not None:
            before, after = cut["nll"] - rows["dense_nf4"]["nll"], row["nll"] - rows[control]["nll"]
            if before > 0:
                shares[name] = 1 - after / before
    return shares
