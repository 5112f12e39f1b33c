"""Readers of files that hold tensors: checkpoints, statistics, adapters, hidden states, teacher logits."""

from pathlib import Path

import torch
from fuzzing import binary_samples as samples
from fuzzing.readers import Reader
from transformers import PreTrainedModel

from lightning_moe.adapters.storage import load_adapter
from lightning_moe.calibration.hidden_states import read_hidden_states
from lightning_moe.export.folders import open_folder
from lightning_moe.export.shards import ShardedWriter
from lightning_moe.files import read_json, read_shapes, read_tensors
from lightning_moe.models.folders import LayerFolder
from lightning_moe.models.loading import load_model
from lightning_moe.models.sources import open_source
from lightning_moe.models.stored_tensors import Part
from lightning_moe.quantization.size import read_sizes
from lightning_moe.records import CalibrationStatistics
from lightning_moe.surgery.structure import ModelStructure, apply_structure
from lightning_moe.training.checkpoint_files import read_checkpoint
from lightning_moe.training.mapped_tensors import map_tensor
from lightning_moe.training.module import RecoveryModule
from lightning_moe.training.rank_loading import RankLoader, is_pruned_folder
from lightning_moe.training.teacher_logits import TeacherLogits


def _run(model: PreTrainedModel) -> None:
    """A forward pass: what was loaded must be a model."""
    with torch.no_grad():
        model(torch.arange(3, 9).unsqueeze(0), use_cache=False)


def _load(folder: Path) -> None:
    load_model(str(folder / "model"))


def _load_and_run(folder: Path) -> None:
    _run(load_model(str(folder / "model")))


def _walk(folder: Path) -> None:
    opened: LayerFolder = open_folder(str(folder / "model"))
    for name in opened.decoder_names:
        opened.load_decoder(name)
    opened.finish()


def _map(folder: Path) -> None:
    tensors, _ = open_source(str(folder / "model"))
    for tensor in tensors.values():
        map_tensor(tensor)
        Part(tensor=tensor, dtype=tensor.dtype)[...]


def _load_shares(folder: Path) -> None:
    source = str(folder / "model")
    if is_pruned_folder(source):
        loader = RankLoader(source)
        for name in ("model.layers.0", "model.layers.1"):
            loader.fill(loader.model.get_submodule(name))


def _count(folder: Path) -> None:
    source = str(folder / "model")
    sizes = read_sizes(source, bits=4)
    sizes.num_bytes([layer.widths for layer in sizes.layers])


def _read_statistics(folder: Path) -> None:
    statistics = CalibrationStatistics.load(folder / "statistics.safetensors")
    assert all(tensor.isfinite().all() for layer in statistics.total() for tensor in layer.values())
    assert statistics.digest


def _read_tensors(folder: Path) -> None:
    tensors, _ = read_tensors(folder / "file.safetensors", what="file of tensors")
    assert read_shapes(folder / "file.safetensors", what="file of tensors").keys() == tensors.keys()


def _read_hidden_states(folder: Path) -> None:
    for hidden_BSH in read_hidden_states(folder / "hidden.bin"):
        assert hidden_BSH.ndim == 3


def _read_teacher_logits(folder: Path) -> None:
    taught = TeacherLogits(folder).of_rows(samples.rows_to_teach(), corpus="wiki")
    for index in range(len(taught)):
        assert taught[index]["teacher_ids"].shape == taught[index]["teacher_logprobs"].shape


def _read_adapter(folder: Path) -> None:
    _run(load_adapter(samples.cut_model(), folder=folder / "adapter").get_base_model())


def _load_checkpoint(folder: Path) -> None:
    RecoveryModule.load_from_checkpoint(folder / "last.ckpt", source=str(folder / "model"))


def _resume(folder: Path) -> None:
    read_checkpoint(folder / "last.ckpt")


def _restore_structure(folder: Path) -> None:
    content = read_json(folder / "structure.json", what="structure")
    apply_structure(samples.small_model(), structure=ModelStructure.from_dict(content))


def _go_on(folder: Path) -> None:
    writer = ShardedWriter(folder=folder / "model", names=("model.layers.0", "model.layers.1"))
    if all(map(writer.done, range(writer.num_shards))):
        writer.write_index()


BINARY_READERS: tuple[Reader, ...] = (
    Reader(name="tensors", make=samples.make_tensors, read=_read_tensors),
    Reader(name="statistics", make=samples.make_statistics, read=_read_statistics),
    Reader(name="hidden_states", make=samples.make_hidden_states, read=_read_hidden_states),
    Reader(name="teacher_logits", make=samples.make_teacher_logits, read=_read_teacher_logits),
    Reader(name="shards", make=samples.make_shards, read=_go_on),
    Reader(name="stored_tensors", make=samples.make_sharded, read=_map),
    Reader(
        name="sizes", make=samples.make_nf4, read=_count, files=("model/config.json", "model/generation_config.json")
    ),
    Reader(name="stock", make=samples.make_stock, read=_load),
    Reader(name="stock_layers", make=samples.make_sharded, read=_walk),
    Reader(name="fp8", make=samples.make_fp8, read=_load),
    Reader(name="fp8_layers", make=samples.make_fp8, read=_walk),
    Reader(name="ragged", make=samples.make_ragged, read=_load_and_run),
    Reader(name="ragged_layers", make=samples.make_ragged, read=_walk),
    Reader(name="nf4", make=samples.make_nf4, read=_load_and_run),
    Reader(name="nf4_layers", make=samples.make_nf4, read=_walk),
    Reader(name="nf4_shares", make=samples.make_nf4, read=_load_shares),
    Reader(name="adapter", make=samples.make_adapter, read=_read_adapter),
    Reader(name="structure", make=samples.make_structure, read=_restore_structure),
    Reader(name="checkpoint", make=samples.make_checkpoint, read=_load_checkpoint, files=("last.ckpt",)),
    Reader(name="resumed", make=samples.make_checkpoint, read=_resume, files=("last.ckpt",)),
)
