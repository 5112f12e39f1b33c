"""Figures: records in, a matplotlib `Figure` out; nothing is shown, saved or left in global state."""

from lightning_moe.reporting.figures.calibration import router_entropy, score_curves, usage_against_width
from lightning_moe.reporting.figures.plan import kept_share, width_heatmap
from lightning_moe.reporting.figures.results import quality_against_bytes, stage_losses
from lightning_moe.reporting.figures.routing import entropy_depth
from lightning_moe.reporting.figures.style import png_bytes

__all__ = [
    "entropy_depth",
    "kept_share",
    "png_bytes",
    "quality_against_bytes",
    "router_entropy",
    "score_curves",
    "stage_losses",
    "usage_against_width",
    "width_heatmap",
]
