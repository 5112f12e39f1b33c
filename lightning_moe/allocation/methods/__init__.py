"""The pruning methods a user chooses from: final objects with plain settings that turn statistics into a plan."""

from lightning_moe.allocation.methods.base import ExpertMethod, PruningMethod
from lightning_moe.allocation.methods.channels import ExactGlobal, PaperA, UniformWidth
from lightning_moe.allocation.methods.coverage import ChannelCoverage, TBCoverage
from lightning_moe.allocation.methods.experts import ExpertDropping, ExpertSparsity, RandomExperts
from lightning_moe.allocation.methods.layers import ChannelRanking
from lightning_moe.allocation.methods.presets import PRESETS, Preset, build_method

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
