"""Criteria: pure functions from calibration statistics to scores, by name."""

from lightning_moe.criteria.channel import CHANNEL_CRITERIA, ChannelCriterion
from lightning_moe.criteria.expert import EXPERT_CRITERIA, ExpertCriterion

__all__ = ["CHANNEL_CRITERIA", "EXPERT_CRITERIA", "ChannelCriterion", "ExpertCriterion"]
