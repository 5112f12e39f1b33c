"""Figures: records in, a matplotlib `Figure` out; nothing is shown, saved or left in global state."""

from lightning_moe.reporting.figures.calibration import router_entropy, score_curves, usage_against_width
from lightning_moe.reporting.figures.curves import concentration, cut_cost, expert_curves
from lightning_moe.reporting.figures.experts import expert_scores
from lightning_moe.reporting.figures.frontier import pareto
from lightning_moe.reporting.figures.layers import activation_depth, layer_weights, smoothings
from lightning_moe.reporting.figures.matrix import loss_matrix
from lightning_moe.reporting.figures.plan import kept_share, width_heatmap
from lightning_moe.reporting.figures.results import quality_against_bytes, stage_losses
from lightning_moe.reporting.figures.retention import by_retention
from lightning_moe.reporting.figures.routing import entropy_depth, mean_entropies
from lightning_moe.reporting.figures.style import png_bytes

__all__ = [
    "activation_depth",
    "by_retention",
    "concentration",
    "cut_cost",
    "entropy_depth",
    "expert_curves",
    "expert_scores",
    "kept_share",
    "layer_weights",
    "loss_matrix",
    "mean_entropies",
    "pareto",
    "png_bytes",
    "quality_against_bytes",
    "router_entropy",
    "score_curves",
    "smoothings",
    "stage_losses",
    "usage_against_width",
    "width_heatmap",
]
