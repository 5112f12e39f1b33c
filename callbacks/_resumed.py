"""Whether a checkpoint was made with the callbacks of this run: Lightning itself would start others afresh."""

from collections.abc import Mapping
from typing import Any

from lightning import Callback

from lightning_moe.training.checkpoint import noted_structure


def check_resumed(callback: Callback, checkpoint: Mapping[str, Any], *, required: bool) -> None:
    """Refuses a checkpoint that has the callback's state under another key: it was made with other settings.

    Args:
        callback: one of this run.
        checkpoint: the one that the run goes on from.
        required: refuse also one that has no state of such a callback, or neither states nor a structure.

    Raises:
        ValueError: with the keys, or with what to add where the checkpoint was written.
    """
    states, kind = checkpoint.get("callbacks"), type(callback).__qualname__
    if states is None and required and noted_structure(checkpoint) is None:
        raise ValueError(
            f"The checkpoint holds neither the state of {kind} nor the structure of its model, as with "
            "`save_weights_only=True`. Call `write_structure(checkpoint, model=...)` of `lightning_moe.training."
            "checkpoint` in `on_save_checkpoint` of the module where it is written, or save whole checkpoints."
        )
    if states is None or callback.state_key in states:
        return
    there = [key for key in states if key.startswith(f"{kind}{{")]
    if there or required:
        raise ValueError(
            f"The checkpoint was made with {there or f'no {kind}'}, and this run has {callback.state_key}. Resume with "
            "the callbacks and settings it was trained with."
        )
