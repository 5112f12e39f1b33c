"""Folders of checkpoint shards as data: PyTorch unpickles their table of contents and numbers without restriction."""

import io
from pathlib import Path, PurePath
from pickle import Unpickler, UnpicklingError
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex
from typing_extensions import override

TABLE = ".metadata"
# What the table of contents is made of, beside types of tensors.
_CLASSES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("collections", "OrderedDict"),
    ("collections", "defaultdict"),
    ("builtins", "dict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),
    ("pathlib._local", "WindowsPath"),
}
_RECORDS = (
    "Metadata",
    "MetadataIndex",
    "TensorStorageMetadata",
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "TensorProperties",
    "StorageMeta",
    "_MEM_FORMAT_ENCODING",
)
_CLASSES |= {("torch.distributed.checkpoint.metadata", name) for name in _RECORDS}


class _TableUnpickler(Unpickler):
    """Makes nothing but the records of the table."""

    @override
    def find_class(self, module: str, name: str) -> Any:
        is_type = module == "torch" and isinstance(vars(torch).get(name), torch.dtype)
        if not is_type and (module, name) not in _CLASSES:
            raise UnpicklingError(f"it asks for the object `{module}.{name}`")
        return super().find_class(module, name)


def check_shards(folder: Path) -> None:
    """Looks through what PyTorch unpickles of a folder of shards, before it does: the table, and what is no tensor.

    Raises:
        ValueError: the table is none, or names a file outside the folder.
        UnpicklingError: something asks for objects that could run code.
    """
    with (folder / TABLE).open("rb") as file:
        table = _TableUnpickler(file).load()
    if not isinstance(table, Metadata) or not isinstance(table.storage_data, dict):
        raise ValueError(f"'{TABLE}' is no table of contents")
    for index, place in table.storage_data.items():
        name = PurePath(place.relative_path)
        if name.is_absolute() or ".." in name.parts:
            raise ValueError(f"'{TABLE}' names a file outside the folder: {str(name)!r:.60}")
        if not isinstance(table.state_dict_metadata[index.fqn], BytesStorageMetadata):
            continue
        torch.load(io.BytesIO(_numbers(folder, place=place, index=index)), weights_only=True)


def _numbers(folder: Path, *, place: Any, index: MetadataIndex) -> bytes:
    """The pickled bytes of what is no tensor, a learning rate say."""
    file = folder / place.relative_path
    size = file.stat().st_size
    if vars(place).get("transform_descriptors") or not 0 <= place.offset <= place.offset + place.length <= size:
        raise ValueError(f"'{index.fqn}' is no part of '{file.name}'")
    with file.open("rb") as opened:
        opened.seek(place.offset)
        return opened.read(place.length)
