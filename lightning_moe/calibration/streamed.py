"""Calibration of a checkpoint that need not fit in memory; an interrupted one goes on after its last whole layer.

K experts per token, E experts, C channels of a layer, n of an expert, H hidden.
"""

import logging
import math
from collections.abc import Iterable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from lightning_moe.calibration.collector import CalibrationCollector
from lightning_moe.calibration.layer_walk import DecoderStep, LayerWalk
from lightning_moe.calibration.measure import weight_norms
from lightning_moe.calibration.nonfinite import NonFiniteError
from lightning_moe.calibration.processes import ALONE, Processes
from lightning_moe.calibration.text import Batch, CalibrationText
from lightning_moe.calibration.unseen import report_unseen
from lightning_moe.calibration.workspace import Workspace
from lightning_moe.files import LazyTensors, digest_of_tensors, open_tensors, write_tensors
from lightning_moe.models.discovery import model_shape, moe_layers
from lightning_moe.models.folders import LayerFolder
from lightning_moe.records import STATISTICS, CalibrationStatistics, ModelShape

log = logging.getLogger(__name__)

_ADVICE = "Remove the folder '{}' and calibrate again."
# Stands in a layer's file where statistics have their corpus, none of which has this name.
_WEIGHTS = ""


def collect_streamed(
    folder: LayerFolder,
    *,
    loaders: Mapping[str, Iterable[Batch]],
    workspace: str | Path,
    moments: bool = True,
    device: torch.device | str = "cpu",
    processes: Processes = ALONE,
    progress: bool = True,
) -> CalibrationStatistics:
    """What `collect_statistics` gives on the model with ChannelExperts, with one decoder layer in memory.

    Each finished layer is a file of `workspace`; called again after an interruption, it goes on after the last one, and
    the statistics are those of an uninterrupted run, byte for byte.

    Args:
        folder: the checkpoint.
        loaders: corpus name -> batches, as for `collect_statistics`.
        workspace: folder for hidden states and finished layers; all processes have to see it. Remove it when the
            statistics are saved: until then they are read from there.
        moments: take the [E, H] and [E, E] sums too.
        device: where a layer and its batches go.
        processes: those that share the batches; all get the same statistics.
        progress: show a progress bar.

    Raises:
        ValueError: see `collect_statistics`; the workspace is of another run or damaged, or the disk is too small.
    """
    walk = LayerWalk(
        folder, loaders=loaders, workspace=workspace, device=device, processes=processes, progress=progress
    )
    space = Workspace.open(workspace, run=_run(walk, moments=moments), processes=processes)
    layers = moe_layers(folder.model)
    with processes.together():
        for layer in layers:
            folder.load(layer.router_name)  # the shape of a model has a digest of its routers
    shape = model_shape(folder.model)
    files = [_file_name(index) for index in range(len(walk.names))]
    first = next((index for index, name in enumerate(files) if not space.done(name)), len(files))
    walk.first = processes.gather(first)[0]
    with processes.together():
        missing = len(files) - sum(map(space.done, files))
        walk.check_room(more_bytes=missing * _file_bytes(shape, num_corpora=len(walk.num_tokens), moments=moments))
    if processes.rank == 0:
        extra = _extra_bytes(shape, text=walk.text, itemsize=folder.model.dtype.itemsize, moments=moments)
        log.info("%s", walk.describe(extra_bytes=extra))
    try:
        for step in walk:
            tensors = _measure(step, folder=folder, moments=moments, processes=processes)
            with processes.together():
                if processes.rank == 0:
                    _save(space.file(files[step.index]), tensors)
    except NonFiniteError:
        space.remove()  # what helps is another type, text or checkpoint: none of them can use this
        raise
    moe_decoders = {layer.block_name.rpartition(".")[0] for layer in layers}
    found = [_load(space.file(file)) for name, file in zip(walk.names, files, strict=True) if name in moe_decoders]
    statistics = CalibrationStatistics(
        shape=shape,
        corpora={corpus: tuple(_of_corpus(one, corpus) for one in found) for corpus in loaders},
        weights=tuple(_of_corpus(one, _WEIGHTS) for one in found),
    )
    if processes.rank == 0:
        report_unseen(statistics)
    return statistics


def _run(walk: LayerWalk, *, moments: bool) -> dict[str, str]:
    """What must be the same for the files of an interrupted run to be of use."""
    packages = ("lightning_moe", "torch", "transformers")
    return {
        "command": "calibrate",
        "checkpoint": walk.folder.fingerprint,
        "dtype": walk.folder.dtype,
        "text": walk.digest,
        "moments": str(moments),
        "device": walk.device.type,
        "software": ", ".join(f"{name} {version(name)}" for name in packages),
    }


def _file_name(index: int) -> str:
    return f"layer_{index:05d}.safetensors"


def _measure(step: DecoderStep, *, folder: LayerFolder, moments: bool, processes: Processes) -> dict[str, Tensor]:
    """All statistics of one layer, under their names in its file; none of a dense layer."""
    if step.moe is None:
        step.run()
        return {}
    with CalibrationCollector(folder.model, moments=moments, layers=[step.moe]) as collector:
        step.run(
            batch=lambda corpus, inputs: collector.batch(corpus=corpus, attention_mask=inputs.get("attention_mask"))
        )
        collector.reduce(processes)
    sums = {f"{corpus}|{name}": value for corpus, (one,) in collector.sums().items() for name, value in one.items()}
    norms = weight_norms(step.moe.experts) if processes.rank == 0 else {}
    return sums | {f"{_WEIGHTS}|{name}": value for name, value in norms.items()}


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    try:
        write_tensors(path, tensors, metadata={"digest": digest_of_tensors(tensors)})
    except OSError as error:
        raise ValueError(
            f"The statistics of a layer cannot be written to '{path}': {error}. Make room there, and run again: it "
            "goes on with this layer."
        ) from error


def _load(path: Path) -> LazyTensors:
    """Tensors of a finished layer, whole and unchanged, each read when it is asked for."""
    try:
        tensors, metadata = open_tensors(path, what="file of a layer's statistics")
        intact = metadata.get("digest") == digest_of_tensors(tensors)
    except ValueError as error:
        raise ValueError(f"{error} {_ADVICE.format(path.parent)}") from error
    if not intact:
        raise ValueError(f"'{path}' is damaged. {_ADVICE.format(path.parent)}")
    return tensors


def _of_corpus(tensors: LazyTensors, corpus: str) -> LazyTensors:
    """Those of one corpus, under the names of the statistics."""
    keys = [key for key in tensors if key.rpartition("|")[0] == corpus]
    return LazyTensors({key.rpartition("|")[2]: partial(tensors.__getitem__, key) for key in keys})


def _file_bytes(shape: ModelShape, *, num_corpora: int, moments: bool) -> int:
    """Bytes of a finished layer's file: sums of each corpus, and norms of the weights."""
    taken = [one for name, one in STATISTICS.items() if not one.optional or (moments and not name.startswith("loss_"))]
    sizes = []
    for layer in shape.layers:
        numbers = sum(math.prod(one.size(layer, hidden_size=shape.hidden_size)) for one in taken)
        sizes.append(8 * (num_corpora * numbers + 6 * layer.num_channels))
    return max(sizes)


def _extra_bytes(shape: ModelShape, *, text: CalibrationText, itemsize: int, moments: bool) -> int:
    """What calibration holds beside a layer: the activations of the largest batch, and sums."""
    num_tokens = max((inputs["input_ids"].numel() for _, inputs in text.batches), default=0)
    wide, hidden_size = max(itemsize, 4), shape.hidden_size
    sizes = []
    for layer in shape.layers:
        num_pairs = num_tokens * layer.top_k
        kept = num_pairs * max(layer.widths) * itemsize + num_pairs * 100 + 6 * num_tokens * hidden_size * wide
        sums = 16 * layer.num_channels * 7 + 16 * layer.num_experts * 4
        if moments:
            kept += num_pairs * hidden_size * itemsize
            sums += 16 * layer.num_experts * (3 * hidden_size + layer.num_experts)
        sizes.append(kept + sums * len(text.num_tokens))
    return max(sizes)
