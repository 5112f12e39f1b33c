"""Criteria: pure functions from calibration statistics to scores, by name; what scores high is kept."""

from collections.abc import Mapping

from lightning_moe.criteria import channel, expert, expert_outputs, gradient
from lightning_moe.criteria.scoring import ChannelCriterion, ExpertCriterion

CHANNEL_CRITERIA: Mapping[str, ChannelCriterion] = {
    "channel_ablation": channel.channel_ablation,
    "activation_norm": channel.activation_norm,
    "channel_saliency": channel.channel_saliency,
    "weight_norm": channel.weight_norm,
    "camera": channel.camera,
    "wanda": channel.wanda,
    "snip": gradient.snip,
    "taylor": gradient.taylor,
}

EXPERT_CRITERIA: Mapping[str, ExpertCriterion] = {
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

__all__ = ["CHANNEL_CRITERIA", "EXPERT_CRITERIA", "ChannelCriterion", "ExpertCriterion"]
