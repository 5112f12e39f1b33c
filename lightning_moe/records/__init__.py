"""Frozen records that the stages hand to each other: shapes, statistics, scores, plans."""

from lightning_moe.records.plan import PrunePlan
from lightning_moe.records.scores import ChannelScores, ExpertScores
from lightning_moe.records.shape import LayerShape, ModelShape
from lightning_moe.records.statistics import NUM_ENTROPY_BINS, STATISTICS, CalibrationStatistics, Statistic

__all__ = [
    "NUM_ENTROPY_BINS",
    "STATISTICS",
    "CalibrationStatistics",
    "ChannelScores",
    "ExpertScores",
    "LayerShape",
    "ModelShape",
    "PrunePlan",
    "Statistic",
]
