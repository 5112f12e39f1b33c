"""Structural pruning, 4-bit packing and recovery of Mixture-of-Experts language models.

Importing this package registers the `channel_moe` storage format and the `deepseek` model type with transformers, so
that stock `AutoModelForCausalLM.from_pretrained` loads pruned folders.
"""

import logging

from lightning_moe.signals import stop_while_starting
from lightning_moe.versions import check_versions

stop_while_starting()
check_versions()

# bitsandbytes looks for an optional kernel package when it is imported and says so each time; nothing here needs it.
_logger = logging.getLogger("bitsandbytes")
_level = _logger.level
_logger.setLevel(logging.ERROR)
import lightning_moe.export.huggingface  # noqa: E402, F401  (registers the format)

_logger.setLevel(_level)

__version__ = "0.1.0"
