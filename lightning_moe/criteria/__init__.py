"""Criteria: pure functions from calibration statistics to scores, by name; what scores high is kept."""

from lightning_moe.criteria import channel, expert, expert_outputs, gradient
from lightning_moe.criteria.scoring import ChannelCriterion, ExpertCriterion

CHANNEL_CRITERIA: dict[str, ChannelCriterion] = {
    "channel_ablation": channel.channel_ablation,
    "activation_norm": channel.activation_norm,
    "channel_saliency": channel.channel_saliency,
    "weight_norm": channel.weight_norm,
    "camera": channel.camera,
    "wanda": channel.wanda,
    "snip": gradient.snip,
    "taylor": gradient.taylor,
}

EXPERT_CRITERIA: dict[str, ExpertCriterion] = {
    "attribution": expert.attribution,
    "ablation": expert.ablation,
    "frequency": expert.frequency,
    "router_weight": expert.router_weight,
    "router_probability": expert.router_probability,
    "reap": expert_outputs.reap,
    "man": expert_outputs.man,
    "msan": expert_outputs.msan,
    "mone": expert_outputs.mone,
    "aimer": expert_outputs.aimer,
}


def register_channel_criterion(criterion: ChannelCriterion, *, name: str) -> None:
    """Adds a score of channels under a name of your own, for this process.

    Raises:
        ValueError: the name is taken.
    """
    _check_free(name)
    CHANNEL_CRITERIA[name] = criterion


def register_expert_criterion(criterion: ExpertCriterion, *, name: str) -> None:
    """Adds a score of experts under a name of your own, for this process.

    Raises:
        ValueError: the name is taken.
    """
    _check_free(name)
    EXPERT_CRITERIA[name] = criterion


def _check_free(name: str) -> None:
    if name in {**CHANNEL_CRITERIA, **EXPERT_CRITERIA}:
        raise ValueError(f"The criterion '{name}' exists already. Choose another name.")


__all__ = [
    "CHANNEL_CRITERIA",
    "EXPERT_CRITERIA",
    "ChannelCriterion",
    "ExpertCriterion",
    "register_channel_criterion",
    "register_expert_criterion",
]
