"""Allocation: pure functions from scores to the channels that stay."""

from lightning_moe.allocation.methods import (
    PRESETS,
    ChannelCoverage,
    ChannelRanking,
    ExactGlobal,
    ExpertDropping,
    ExpertMethod,
    ExpertSparsity,
    PaperA,
    Preset,
    PruningMethod,
    RandomExperts,
    TBCoverage,
    UniformWidth,
    build_method,
)

__all__ = [
    "PRESETS",
    "ChannelCoverage",
    "ChannelRanking",
    "ExactGlobal",
    "ExpertDropping",
    "ExpertMethod",
    "ExpertSparsity",
    "PaperA",
    "Preset",
    "PruningMethod",
    "RandomExperts",
    "TBCoverage",
    "UniformWidth",
    "build_method",
]
