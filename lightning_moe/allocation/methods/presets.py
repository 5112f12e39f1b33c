"""Methods by name."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from lightning_moe.allocation.methods.base import PruningMethod
from lightning_moe.allocation.methods.channels import ExactGlobal, PaperA, UniformWidth
from lightning_moe.allocation.methods.experts import ExpertDropping

PRESETS: Mapping[str, type[PruningMethod]] = {
    "exact_global": ExactGlobal,
    "paper_a": PaperA,
    "uniform": UniformWidth,
    "reap": ExpertDropping,
    "expert_dropping": ExpertDropping,  # the name that plans of `reap` carry
}


def build_method(method: str | PruningMethod, **settings: Any) -> PruningMethod:
    """A method from the name of a preset; a method object passes through.

    Args:
        method: Name or object.
        **settings: Fields of the preset that differ from their defaults.

    Raises:
        ValueError: an unknown name or setting, settings beside an object, or something else.
    """
    if isinstance(method, PruningMethod) and not settings:
        return method
    if not isinstance(method, str) or method not in PRESETS:
        beside = f" with the settings {sorted(settings)}" if settings else ""
        raise ValueError(
            f"`method` must be a PruningMethod without settings or one of {list(PRESETS)}, got {method!r}{beside}."
        )
    known = sorted(own.name for own in fields(PRESETS[method]) if own.init)
    if not set(settings) <= set(known):
        raise ValueError(f"The method '{method}' has the settings {known}, got {sorted(settings)}.")
    return PRESETS[method](**settings)
