"""The pruning methods a user chooses from: final objects with plain settings that turn statistics into a plan."""

from lightning_moe.allocation.methods.base import PruningMethod
from lightning_moe.allocation.methods.channels import ExactGlobal, PaperA, UniformWidth
from lightning_moe.allocation.methods.experts import ExpertDropping
from lightning_moe.allocation.methods.presets import PRESETS, build_method

__all__ = ["PRESETS", "ExactGlobal", "ExpertDropping", "PaperA", "PruningMethod", "UniformWidth", "build_method"]
