"""DoRA adapters for cut and packed models: inject, train, save, load, merge, cut."""

from lightning_moe.adapters.cut import cut_dora_experts
from lightning_moe.adapters.experts import DoraExperts
from lightning_moe.adapters.groups import describe_trainable, trainable_groups
from lightning_moe.adapters.inject import AdapterConfig, inject_adapters
from lightning_moe.adapters.merge import merge_adapters
from lightning_moe.adapters.router import DoraRouter
from lightning_moe.adapters.storage import adapter_config_of, load_adapter, save_adapter

__all__ = [
    "AdapterConfig",
    "DoraExperts",
    "DoraRouter",
    "adapter_config_of",
    "cut_dora_experts",
    "describe_trainable",
    "inject_adapters",
    "load_adapter",
    "merge_adapters",
    "save_adapter",
    "trainable_groups",
]
