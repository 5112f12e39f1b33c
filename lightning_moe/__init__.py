"""Structural pruning, 4-bit packing and recovery of Mixture-of-Experts language models.

Importing this package registers the `channel_moe` storage format and the `deepseek` model type with transformers, so
that stock `AutoModelForCausalLM.from_pretrained` loads pruned folders.
"""

import lightning_moe.export.huggingface  # noqa: F401  (registers the format)

__version__ = "0.1.0"
