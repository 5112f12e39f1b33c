"""What pruning layer by layer takes: memory, and room on the disk.  T tokens of a batch, n channels of an expert."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_moe.calibration.gram_sums import GramColumns, gram_bytes
from lightning_moe.calibration.layer_walk import LayerWalk
from lightning_moe.calibration.memory import LIBRARY_BYTES
from lightning_moe.calibration.routed import sum_dtype
from lightning_moe.export.outline import bytes_below
from lightning_moe.models.discovery import moe_layers
from lightning_moe.models.folders import LayerFolder
from lightning_moe.models.streaming import StockFolder
from lightning_moe.quantization.stored import StoredTensor, sharded_bytes
from lightning_moe.records import PrunePlan
from lightning_moe.surgery.repair import experts_to_fit
from lightning_moe.surgery.streaming import NUM_PARTS

_GB, _GIB = 1e9, 2**30
# float64 matrices of n x n that solving for one expert takes at once.
_MATRICES = 8


@dataclass(frozen=True, kw_only=True)
class RepairCosts:
    """What a repair holds beside a layer.

    Args:
        gram_bytes: Gram matrices of all the experts of the largest layer.
        expert_bytes: of the largest expert.
        other_bytes: activations of a batch, and the matrices of one expert while it is solved for.
        cut_bytes: the kept rows of a projection, copied once the Grams are gone.
    """

    gram_bytes: int
    expert_bytes: int
    other_bytes: int
    cut_bytes: int

    def memory_gb(self, asked: float | None, *, layer_bytes: int) -> float:
        """GiB for Grams: what was asked for, else an eighth of a decoder layer, and not less than one expert's.

        Raises:
            ValueError: less was asked for than one expert's.
        """
        if asked is None:
            return max(layer_bytes / 8, self.expert_bytes) / _GIB
        if asked * _GIB < self.expert_bytes:
            raise ValueError(
                f"`memory_gb` must be at least {self.expert_bytes / _GIB:.3g}: the Gram matrices of one expert take "
                f"that much, got {asked}. Raise it, or do without repair."
            )
        return asked

    def extra_bytes(self, memory_gb: float) -> int:
        """Bytes beside the layer with so much memory for Grams."""
        grams = int(min(self.gram_bytes, memory_gb * _GIB))
        return max(grams + self.other_bytes, self.cut_bytes)


def repair_costs(walk: LayerWalk, *, plan: PrunePlan, columns: GramColumns, after_nf4: bool) -> RepairCosts:
    """Of the largest layer, from shapes alone."""
    model = walk.folder.model
    itemsize = model.dtype.itemsize
    num_tokens = max((inputs["input_ids"].numel() for _, inputs in walk.text.batches), default=0)
    grams, experts, others, rows = [0], [0], [0], [0]
    for layer, shape in zip(moe_layers(model), plan.shape.layers, strict=True):
        wanted = experts_to_fit(plan, layer_index=layer.index, after_nf4=after_nf4)
        counts = [columns.count(layer, expert) for expert in wanted]
        sizes = [gram_bytes(count, dtype=sum_dtype(model.dtype)) for count in counts]
        grams.append(sum(sizes))
        experts.append(max(sizes, default=0))
        pairs = num_tokens * shape.top_k * (max(counts, default=0) * itemsize + 100)
        states = 6 * num_tokens * plan.shape.hidden_size * 4
        others.append(pairs + states + _MATRICES * 8 * max(counts, default=0) ** 2)
        rows.append(sum(plan.widths(layer.index)) * plan.shape.hidden_size * itemsize)
    return RepairCosts(gram_bytes=max(grams), expert_bytes=max(experts), other_bytes=max(others), cut_bytes=max(rows))


def peak_without_repair(folder: LayerFolder, *, stored: Sequence[StoredTensor]) -> int:
    """Bytes: a layer as it will be stored and what it is made from, or everything outside the layers."""
    whole, outside = [], sum(tensor.num_bytes for tensor in stored)
    for name in folder.decoder_names:
        before, after = folder.decoder_bytes(name), bytes_below(stored, name)
        outside -= after
        # A stock layer is read in parts, others are read whole and copied projection by projection.
        whole.append(after + 4 * before // NUM_PARTS if isinstance(folder, StockFolder) else before + after)
    return LIBRARY_BYTES + max(*whole, outside)


def bytes_to_write(folder: LayerFolder, *, stored: Sequence[StoredTensor]) -> int:
    """Bytes of the shards and of their index."""
    return sharded_bytes(stored, decoder_names=folder.decoder_names)


def check_room(*, out: Path, num_bytes: int, workspace: Path, buffer_bytes: int) -> int:
    """Free bytes where `out` will be.

    Args:
        out: what is written.
        num_bytes: what is still to be written there.
        workspace: where hidden states go.
        buffer_bytes: bytes of those.

    Raises:
        ValueError: there is too little room.
    """
    parent = _existing(out.parent)
    free = shutil.disk_usage(parent).free
    same_disk = os.stat(parent).st_dev == os.stat(_existing(workspace)).st_dev
    needed = num_bytes + (buffer_bytes if same_disk else 0)
    if free < needed:
        raise ValueError(
            f"'{out}' needs {needed / _GB:.3g} GB more in '{out.parent}', hidden states included, and {free / _GB:.3g} "
            "GB are free there. Make room, or name another folder (`out`, and `workspace` for the hidden states)."
        )
    return free


def _existing(folder: Path) -> Path:
    while not folder.is_dir():
        folder = folder.absolute().parent
    return folder
