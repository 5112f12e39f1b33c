"""Methods side by side: a grid of rows, each cut, saved, reloaded from disk and evaluated; rows are reused.

`make_row` makes one row from a model, a plan and text; `Comparison` makes many and shares what they have in common;
`Grid` says which.
"""

from lightning_moe.evaluation.compare.bench import CutModel, Measures, cut_copy, make_row
from lightning_moe.evaluation.compare.grid import Grid, GridMethod, needs_gradients
from lightning_moe.evaluation.compare.rows import CONTROL, Repair, Row, StageSpec
from lightning_moe.evaluation.compare.run import DENSE, Comparison, check_names

__all__ = [
    "CONTROL",
    "DENSE",
    "Comparison",
    "CutModel",
    "Grid",
    "GridMethod",
    "Measures",
    "Repair",
    "Row",
    "StageSpec",
    "check_names",
    "cut_copy",
    "make_row",
    "needs_gradients",
]
