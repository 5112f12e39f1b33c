"""FSDP2: shard a model over the processes of a device mesh, and put it together again."""

import logging
from collections.abc import Callable
from typing import Any

from bitsandbytes.nn.modules import Linear4bit
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lightning_moe.models.discovery import moe_layers
from lightning_moe.progress import hidden

log = logging.getLogger(__name__)


def shard_model(model: PreTrainedModel, *, mesh: DeviceMesh, fill: Callable[[nn.Module], None] | None = None) -> None:
    """Shards every decoder layer, and what is around them, over the data-parallel dimension, in place; once.

    Packed expert rows stay 4-bit codes: a process holds its part of a layer's codes and, while the layer runs, all of
    them. Types are left alone (autocast decides what is computed in 16 bit). Whole in every process stay the weights of
    bitsandbytes' 4-bit Linear layers, because sharding would part them from their quantisation constants: at the shape
    of Qwen3-30B-A3B the attention's, 0.5 of 16 GB.

    Args:
        model: cut, packed and adapted already: FSDP2 does not follow a later change.
        mesh: dimensions `data_parallel` and `tensor_parallel`, the second of size 1, as `ModelParallelStrategy` makes.
        fill: puts what is on the meta device of a decoder layer in place, right before the layer is sharded.

    Raises:
        ValueError: tensor parallelism is asked for, or trained parameters are of several types.
    """
    if isinstance(model, FSDPModule):
        return
    _check_mesh(mesh)
    _check_types(model)
    whole = {module.weight for module in model.modules() if isinstance(module, Linear4bit)}
    settings: dict[str, Any] = {"mesh": mesh["data_parallel"], "ignored_params": whole}
    unseen = fill is None or hidden(progress=mesh.get_rank() == 0)
    for layer in tqdm(decoder_layers(model), desc="Reading shares of layers", disable=unseen):
        if fill is not None:
            fill(layer)
        fully_shard(layer, **settings)
    fully_shard(model, **settings)
    num_bytes = sum(weight.nbytes for weight in whole)
    log.info("Sharded over %d processes; %.2f GB are whole in each.", settings["mesh"].size(), num_bytes / 1e9)


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """All decoder layers, dense ones too: the list in which the MoE layers are."""
    inside = moe_layers(model)[0].block_name.rpartition(".")[0]
    return list(model.get_submodule(inside.rpartition(".")[0]).children())


def is_sharded(model: nn.Module) -> bool:
    """Whether this process holds only parts of some parameters."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole_state(module: nn.Module) -> dict[str, Any]:
    """All parameters and buffers of a sharded module on the CPU of rank 0; empty elsewhere. Every process calls it."""
    return get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def _check_mesh(mesh: DeviceMesh) -> None:
    size = mesh["tensor_parallel"].size()
    if size > 1:
        raise ValueError(
            f"`tensor_parallel_size` is {size}, but experts of unequal width are not split by tensor parallelism. Use "
            "ModelParallelStrategy(data_parallel_size=<number of processes>, tensor_parallel_size=1)."
        )


def _check_types(model: PreTrainedModel) -> None:
    names = {parameter.dtype: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if len(names) > 1:
        listed = ", ".join(f"'{name}' in {dtype}" for dtype, name in names.items())
        raise ValueError(
            f"FSDP2 trains parameters of one type, and these differ: {listed}. Load the model in float32, or train "
            "fewer parts (`train_norms: false`)."
        )
