"""Methods by name: a class and the settings that make the preset of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from lightning_moe.allocation.methods.base import PruningMethod
from lightning_moe.allocation.methods.channels import ExactGlobal, PaperA, UniformWidth
from lightning_moe.allocation.methods.coverage import ChannelCoverage, TBCoverage
from lightning_moe.allocation.methods.experts import ExpertDropping, ExpertSparsity, RandomExperts
from lightning_moe.allocation.methods.layers import ChannelRanking

# Settings as a config gives them: plain values, never a class to be made.
MethodArgs = dict[str, bool | int | float | str | None]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A class and those of its settings that differ from the class' own defaults."""

    method: type[PruningMethod]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def known(self) -> list[str]:
        """Names of the settings that may be given."""
        return sorted(own.name for own in fields(self.method) if own.init)


def _by_score(*criteria: str) -> dict[str, Preset]:
    return {criterion: Preset(method=ExpertDropping, settings={"criterion": criterion}) for criterion in criteria}


def _ranking(criterion: str, *, layers: str) -> Preset:
    return Preset(method=ChannelRanking, settings={"criterion": criterion, "layers": layers})


PRESETS: Mapping[str, Preset] = {
    "exact_global": Preset(method=ExactGlobal),
    "channel_coverage": Preset(method=ChannelCoverage),
    "paper_a": Preset(method=PaperA),
    "tb_coverage": Preset(method=TBCoverage),
    "random": Preset(method=RandomExperts),
    **_by_score("frequency", "router_weight", "router_probability", "reap", "man", "msan", "mone", "aimer"),
    "expert_sparsity": Preset(method=ExpertSparsity),
    "uniform": Preset(method=UniformWidth),
    "wanda": _ranking("wanda", layers="uniform"),
    "magnitude": _ranking("weight_norm", layers="uniform"),
    "camera": _ranking("camera", layers="uniform"),
    "snip": _ranking("snip", layers="global"),
    "taylor": _ranking("taylor", layers="global"),
    "u_shaped": _ranking("channel_ablation", layers="u_shaped"),
    "loss_proportional": _ranking("channel_ablation", layers="loss_proportional"),
    # The names that plans of these classes carry; their provenance holds the settings.
    "expert_dropping": Preset(method=ExpertDropping),
    "channel_ranking": Preset(method=ChannelRanking),
}


def build_method(method: str | PruningMethod, **settings: Any) -> PruningMethod:
    """A method from the name of a preset; a method object passes through.

    A plan's method again: `build_method(plan.method, **json.loads(plan.provenance["settings"]))`.

    Args:
        method: Name or object.
        **settings: Fields of the preset that differ from its defaults.

    Raises:
        ValueError: an unknown name or setting, settings beside an object, or something else.

    Examples:
        >>> build_method("frequency", scope="global").criterion
        'frequency'
    """
    if isinstance(method, PruningMethod) and not settings:
        return method
    if not isinstance(method, str) or method not in PRESETS:
        beside = f" with the settings {sorted(settings)}" if settings else ""
        raise ValueError(
            f"`method` must be a PruningMethod without settings or one of {list(PRESETS)}, got {method!r}{beside}."
        )
    preset = PRESETS[method]
    if not set(settings) <= set(preset.known):
        raise ValueError(f"The method '{method}' has the settings {preset.known}, got {sorted(settings)}.")
    return preset.method(**{**preset.settings, **settings})
