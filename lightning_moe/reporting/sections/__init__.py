"""Sections of the report: each takes records and gives a `Block` of HTML and pictures."""

from lightning_moe.reporting.sections.calibration import calibration_blocks
from lightning_moe.reporting.sections.comparison import comparison_block
from lightning_moe.reporting.sections.matrix import matrix_block
from lightning_moe.reporting.sections.plans import plan_block
from lightning_moe.reporting.sections.results import result_block, version_block

__all__ = ["calibration_blocks", "comparison_block", "matrix_block", "plan_block", "result_block", "version_block"]
