"""Allocation: pure functions from scores to the channels that stay."""

from lightning_moe.allocation.methods import (
    PRESETS,
    ExactGlobal,
    ExpertDropping,
    PaperA,
    PruningMethod,
    UniformWidth,
    build_method,
)

__all__ = ["PRESETS", "ExactGlobal", "ExpertDropping", "PaperA", "PruningMethod", "UniformWidth", "build_method"]
