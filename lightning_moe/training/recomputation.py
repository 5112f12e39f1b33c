"""Decoder layers that keep their inputs alone and are run once more in backward."""

import transformers
from transformers import PreTrainedModel

from lightning_moe.versions import release

# Its own name since then; the older one warns.
_RENAMED = "5.23"
_SETTINGS = {"use_reentrant": False}


def recompute_layers(model: PreTrainedModel) -> None:
    """Asks transformers for it, by the name that its version has.

    Raises:
        ValueError: layers of this kind of model cannot be run again (transformers' own words).
    """
    if release(transformers.__version__) >= release(_RENAMED):
        model.activation_checkpointing_enable(_SETTINGS)
    else:
        model.gradient_checkpointing_enable(_SETTINGS)
