"""A model as safetensors shards, one after the other: each appears when it is whole, and their index last."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_moe.files import write_atomically

log = logging.getLogger(__name__)

INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True)
class ShardedWriter:
    """L + 1 files of a model of L decoder layers: one for each layer, and the last for everything else.

    A shard that is there with its digest beside the folder is whole: it stays when an interrupted job goes on.

    Args:
        folder: where they go.
        names: full names of the decoder layers, first layer first.
    """

    folder: Path
    names: Sequence[str]

    @property
    def num_shards(self) -> int:
        """L + 1."""
        return len(self.names) + 1

    def path(self, index: int) -> Path:
        """File of a decoder layer, or of everything else (index L)."""
        return self.folder / f"model-{index + 1:05d}-of-{self.num_shards:05d}.safetensors"

    def done(self, index: int) -> bool:
        """Whether a shard is there, byte for byte as it was written."""
        path, digest = self.path(index), self._digest_path(index)
        if not (path.is_file() and digest.is_file()):
            return False
        if digest.read_bytes() == _digest(path).encode():
            return True
        log.warning("'%s' of an interrupted run is damaged and is written again.", path)
        return False

    def _digest_path(self, index: int) -> Path:
        """Beside the folder, so that it does not become part of the model."""
        return self.folder.parent / f"{self.path(index).stem}.sha256"

    def write(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Writes one shard; tensors may be on any device.

        Raises:
            ValueError: it cannot be written, the disk being full, say; the message names it.
        """
        path = self.path(index)
        try:
            with write_atomically(path) as temporary:
                content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
                save_file(content, str(temporary), metadata={"format": "pt"})
            with write_atomically(self._digest_path(index)) as temporary:
                temporary.write_text(_digest(path), encoding="utf-8")
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"'{path}' cannot be written: {error}. Make room there and run the same command again: the shards that "
                "are whole are kept."
            ) from error

    def write_index(self) -> None:
        """Which tensor is in which shard, once all of them are there.

        Raises:
            ValueError: a shard is damaged, or the index cannot be written.
        """
        total, files = 0, {}
        for index in range(self.num_shards):
            path = self.path(index)
            sizes = _tensor_bytes(path)
            total += sum(sizes.values())
            files |= dict.fromkeys(sizes, path.name)
        content = {"metadata": {"total_size": total}, "weight_map": {name: files[name] for name in sorted(files)}}
        (self.folder / INDEX_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tensor_bytes(path: Path) -> dict[str, int]:
    """Name and bytes of every tensor of a shard, from its header alone."""
    try:
        with safe_open(str(path), framework="pt"):
            pass  # safetensors' own checks
    except (SafetensorError, OSError) as error:
        raise ValueError(f"'{path}' is damaged: {error}. Remove it and run the same command again.") from error
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    entries = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    return {name: last - first for name, (first, last) in entries.items()}
