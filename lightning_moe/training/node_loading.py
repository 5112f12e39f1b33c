"""Processes that load one model: it is the same for all of them, and the memory of a node holds it once.

`from_pretrained` maps a folder of ours, so that the processes of a node share its pages. What cannot be mapped as it is
stored (stock experts, which are put together; another type; a teacher that is packed) is written once a node, as it
will be in memory, to the system's temporary folder (`TMPDIR`) and mapped from there. That copy is gone from the disk
when all have opened it; what a killed process left there goes when the next one loads a model.
"""

import glob
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from lightning_moe.calibration.processes import Processes
from lightning_moe.export.huggingface import quantization_config_of
from lightning_moe.export.outline import write_configs
from lightning_moe.models.channel_experts import ChannelExperts
from lightning_moe.models.discovery import moe_layers
from lightning_moe.models.fp8 import is_fp8, quantization_of
from lightning_moe.models.loading import DtypeName, load_model, read_config
from lightning_moe.models.saving import QUANT_METHOD
from lightning_moe.models.sources import find_file, open_source
from lightning_moe.models.stored_tensors import StoredTensor
from lightning_moe.training.mapped_tensors import ALIGNMENT, write_mappable

_PREFIX = "lightning_moe_"
log = logging.getLogger(__name__)


def load_shared(
    source: str, *, dtype: DtypeName, processes: Processes, pack: Callable[[], PreTrainedModel] | None = None
) -> PreTrainedModel:
    """What `load_model` gives, bit for bit, with one copy in the memory of each node.

    Args:
        source: folder, asset or hub name of the model, which every machine has.
        dtype: type of the weights that are not packed.
        processes: all of them call this.
        pack: gives the model in place of `load_model`: packed, of a stock source.

    Raises:
        ValueError: see `load_model` and `check_same`; or the copy cannot be written. All processes raise it.
    """
    make = pack or (lambda: load_model(source, dtype=dtype))
    if processes.size == 1:
        return make()
    check_same(source, processes=processes)
    peers = _peers(processes)
    several = any(len(ranks) > 1 for ranks in processes.gather(peers))
    copied = several and _needs_copy(source, dtype=dtype, packs=pack is not None)
    if copied and _has_room(source, processes=processes):
        return _load_copy(source, make=make, peers=peers, processes=processes)
    with processes.together():
        return make()


def check_same(source: str, *, processes: Processes) -> None:
    """Refuses a source that some process cannot read, or that is not the same for all; every process calls it.

    Compared are the config, the headers of the files and samples of what is in them.

    Raises:
        ValueError: so it is. All processes raise it, with the rank and the machine that it is about.
    """
    host = socket.gethostname()
    with processes.together():
        try:
            digest = open_source(source)[1] if read_config(source) else ""
        except ValueError as error:
            raise ValueError(f"Process {processes.rank} on '{host}': {error}") from error
    seen = processes.gather((digest, host))
    for rank, (other, where) in enumerate(seen):
        if other != seen[0][0]:
            raise ValueError(
                f"'{source}' is not the same model for all processes: process 0 on '{seen[0][1]}' and process {rank} "
                f"on '{where}' read different files. Copy one folder to every machine, or name one that all see."
            )


def leave_frozen_alone(module: nn.Module, *, loaded: set[StorageWeakRef]) -> None:
    """DDP begins by sending every parameter to all processes, which would give each its own copy of what is mapped.

    Left out are frozen parameters that are still where they were loaded: all processes have read the same.

    Args:
        module: what DDP is going to wrap.
        loaded: where parameters were loaded (`storages_of`); nowhere: everything is sent.
    """
    names = [
        name
        for name, parameter in module.named_parameters()
        if not parameter.requires_grad and StorageWeakRef(parameter.untyped_storage()) in loaded
    ]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)


def storages_of(model: nn.Module) -> set[StorageWeakRef]:
    """Where the parameters of a model are."""
    return {StorageWeakRef(parameter.untyped_storage()) for parameter in model.parameters() if not parameter.is_meta}


def _peers(processes: Processes) -> list[int]:
    """The ranks, ascending, that have the temporary folder of this process: those of its node."""
    folder = os.stat(tempfile.gettempdir())
    place = (socket.gethostname(), folder.st_dev, folder.st_ino)
    return [rank for rank, other in enumerate(processes.gather(place)) if other == place]


def _needs_copy(source: str, *, dtype: DtypeName, packs: bool) -> bool:
    """Whether loading makes tensors of its own: stock experts, a cast, packing, rows that lie badly in their file."""
    config = read_config(source)
    quantization = quantization_of(config)
    if not quantization or is_fp8(config):
        return find_file(source, "adapter_config.json") is None
    if quantization.get("quant_method") != QUANT_METHOD:
        return False  # another package's
    if dtype != "auto" and getattr(torch, dtype) != config.dtype:
        return True
    return not quantization["packed_experts"] and (packs or not _are_aligned(source, names=quantization["widths"]))


def _are_aligned(source: str, *, names: object) -> bool:
    assert isinstance(names, dict)
    stored, _ = open_source(source)
    rows = [tensor for key, tensor in stored.items() if key.rpartition(".")[0].rpartition(".")[0] in names]
    return not any(isinstance(tensor, StoredTensor) and tensor.start % ALIGNMENT for tensor in rows)


def _has_room(source: str, *, processes: Processes) -> bool:
    """Whether the temporary folder of every process has room for a copy; it may be one in fp32."""
    stored = (tensor for tensor in open_source(source)[0].values() if isinstance(tensor, StoredTensor))
    needed = 2 * sum(file.stat().st_size for file in {tensor.file for tensor in stored})
    free = shutil.disk_usage(tempfile.gettempdir()).free
    lacking = [host for host, found in processes.gather((socket.gethostname(), free)) if found < needed]
    if lacking and processes.rank == 0:
        log.warning(
            "Each process keeps its own copy of '%s': '%s' has less than %.3g GB left for temporary files. Set TMPDIR "
            "to a folder with more room, and the processes of a machine share one copy.",
            *(source, lacking[0], needed / 1e9),
        )
    return not lacking


def _load_copy(
    source: str, *, make: Callable[[], PreTrainedModel], peers: list[int], processes: Processes
) -> PreTrainedModel:
    """The first process of a node writes the model, and all of them map it."""
    leads = processes.rank == peers[0]
    folder = processes.gather(_own_folder() if leads else None)[peers[0]]
    try:
        with processes.together():
            if leads:
                _write_copy(make(), folder=Path(folder))
        with processes.together():
            model = load_model(folder)
    finally:
        if leads:
            shutil.rmtree(folder)
    model.name_or_path = model.config.name_or_path = read_config(source).name_or_path
    return model


def _own_folder() -> str:
    """A temporary folder that says whose it is; those of processes that are gone are removed."""
    place, host = Path(tempfile.gettempdir()), socket.gethostname()
    for folder in place.glob(f"{_PREFIX}{glob.escape(host)}_*_*"):
        owner = folder.name.removeprefix(f"{_PREFIX}{host}_").partition("_")[0]
        if owner.isdecimal() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)  # another user's, say
    return tempfile.mkdtemp(prefix=f"{_PREFIX}{host}_{os.getpid()}_")


def _write_copy(model: PreTrainedModel, *, folder: Path) -> None:
    """The model as it is in memory, each tensor where it can be used from a map."""
    if all(isinstance(layer.experts, ChannelExperts) for layer in moe_layers(model)):
        model.config.quantization_config = quantization_config_of(model)
    tied = model.all_tied_weights_keys
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    try:
        write_configs(model, folder=folder)
        write_mappable(folder / "model.safetensors", tensors)
    except OSError as error:
        raise ValueError(
            f"The copy that the processes of '{socket.gethostname()}' share cannot be written to '{folder}': {error}. "
            "Set TMPDIR to a folder with more room."
        ) from error
