"""What a checkpoint says about the structure of its model, so that loading it needs nothing else.

`LanguageModelModule` and `RecoveryModule` use it. In your own LightningModule, one line lets `load_from_checkpoint`
build the model as the callbacks had cut, packed or adapted it:

    def on_load_checkpoint(self, checkpoint):
        restore_structure(checkpoint, model=self.lm)

The callbacks note the structure; with `ModelCheckpoint(save_weights_only=True)`, which leaves callbacks out, call
`write_structure(checkpoint, model=self.lm)` in `on_save_checkpoint`.
"""

from collections.abc import Mapping
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from lightning_moe.models.channel_experts import ChannelExperts
from lightning_moe.models.discovery import model_shape
from lightning_moe.surgery.structure import ModelStructure, apply_cut, apply_structure, structure_of
from lightning_moe.training.sharding import is_sharded

CHECKPOINT_KEY = "lightning_moe"


def write_structure(checkpoint: dict[str, Any], *, model: PreTrainedModel) -> None:
    """Notes how `model` differs from the one its source gives: cuts, packing, adapters. Plain types; twice is once."""
    checkpoint.setdefault(CHECKPOINT_KEY, {})["structure"] = structure_of(model).to_dict()


def noted_structure(checkpoint: Mapping[str, Any]) -> ModelStructure | None:
    """The structure that a checkpoint notes; None if it notes none.

    Raises:
        ValueError: it is damaged, or another version of lightning_moe wrote it.
    """
    content = checkpoint.get(CHECKPOINT_KEY, {})
    if not isinstance(content, Mapping):
        raise ValueError(f"The checkpoint is damaged: `{CHECKPOINT_KEY}` in it is no mapping, but {content!r:.60}.")
    if "structure" not in content:
        return None
    try:
        return ModelStructure.from_dict(content["structure"])
    except ValueError as error:
        raise ValueError(f"The checkpoint does not say what its model looks like: {error}") from error


def restore_structure(checkpoint: Mapping[str, Any], *, model: PreTrainedModel) -> PeftModel | None:
    """Gives a freshly loaded model the structure that the checkpoint notes; does nothing where it has it already.

    Returns:
        PEFT's model around the adapters, if they were put in now.

    Raises:
        ValueError: the structure is damaged, or it is that of another model, or of another cut, packing or adapter than
            the model has already.
    """
    structure = noted_structure(checkpoint)
    return None if structure is None else apply_structure(model, structure=structure)


def restore_cut(checkpoint: Mapping[str, Any], *, model: PreTrainedModel) -> None:
    """Gives a freshly loaded model the cut that the checkpoint notes, and neither 4-bit layers nor adapters.

    Raises:
        ValueError: see `restore_structure`.
    """
    structure = noted_structure(checkpoint)
    if structure is not None:
        apply_cut(model, structure=structure)


def keep_learned(checkpoint: dict[str, Any], *, module: nn.Module, model: PreTrainedModel) -> None:
    """Leaves out of `state_dict` what the source and the structure give again, and notes which source that is.

    A folder of shards (`save_distributed_checkpoint=True`) keeps everything: Lightning cannot load a part of a module.
    """
    state: dict[str, Tensor] = checkpoint["state_dict"]
    if not any(isinstance(value, DTensor) for value in state.values()):
        learned = _learned(module)
        checkpoint["state_dict"] = {name: value for name, value in state.items() if name in learned}
    checkpoint.setdefault(CHECKPOINT_KEY, {})["router_digest"] = _router_digest(model)


def complete_state(checkpoint: dict[str, Any], *, module: nn.Module, model: PreTrainedModel) -> None:
    """Puts the module's own frozen tensors, not copied, beside those that `keep_learned` kept.

    Raises:
        ValueError: a trained tensor is missing, has no place or has another shape, or the source has other routers.
    """
    noted, present = checkpoint.get(CHECKPOINT_KEY, {}).get("router_digest"), _router_digest(model)
    if noted is not None and present is not None and noted != present:
        raise ValueError(
            f"The checkpoint holds what was trained on another `source`: the routers of this one, "
            f"'{model.name_or_path}', have other weights. Name the model it was trained from, in the same `dtype`."
        )
    if "state_dict" not in checkpoint:  # ModelParallelStrategy loads the weights itself
        return
    stored: dict[str, Tensor] = checkpoint["state_dict"]
    shapes, learned = ({name: tuple(t.shape) for name, t in tensors.items()} for tensors in (stored, _learned(module)))
    odd = sorted(name for name in shapes.keys() | learned.keys() if shapes.get(name) != learned.get(name))
    if odd:
        raise ValueError(
            f"The checkpoint holds other adapters than the model: '{odd[0]}' is {shapes.get(odd[0])} there and "
            f"{learned.get(odd[0])} here (None: absent). Resume with the callbacks and settings it was trained with."
        )
    # Tied weights under each of their names, as `state_dict` has them.
    own = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    checkpoint["state_dict"] = {name: own[name] for name in module.state_dict() if name in own} | stored


def _learned(module: nn.Module) -> dict[str, Tensor]:
    """What a source and a structure do not give: trainable parameters, and down rows that a repair fitted anew."""
    learned: dict[str, Tensor] = {name: value for name, value in module.named_parameters() if value.requires_grad}
    for prefix, child in module.named_modules():
        if isinstance(child, ChannelExperts) and child.origin.refitted:
            rows = child.projection("down_proj").state_dict(keep_vars=True, prefix=f"{prefix}.down_proj.")
            learned |= rows
    return learned


def _router_digest(model: PreTrainedModel) -> str | None:
    """None where the weights are spread over processes."""
    return None if is_sharded(model) else model_shape(model).router_digest
