"""Lightning callbacks that decide when `lightning_moe` calibrates, cuts, packs, recovers, reports and exports."""

import lightning_moe  # noqa: F401  (first: it says which library is missing, before one of them is imported)
from callbacks.calibration import ExpertCalibration
from callbacks.channel_pruning import ChannelPruning
from callbacks.expert_pruning import ExpertPruning
from callbacks.export import ExportPruned
from callbacks.recovery import Recovery
from callbacks.report import CompressionReport
from callbacks.router_monitor import RouterMonitor

__all__ = [
    "ChannelPruning",
    "CompressionReport",
    "ExpertCalibration",
    "ExpertPruning",
    "ExportPruned",
    "Recovery",
    "RouterMonitor",
]
