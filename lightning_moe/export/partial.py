"""A pruned folder that grows as `<out>.partial`, goes on after an interruption, and takes its name when it is whole."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import PreTrainedModel

from lightning_moe.calibration.processes import Processes
from lightning_moe.calibration.workspace import Workspace
from lightning_moe.export.costs import bytes_to_write, check_room
from lightning_moe.export.manifest import write_manifest
from lightning_moe.export.model_card import carry_card, write_card
from lightning_moe.export.outline import stored_tensors, write_configs
from lightning_moe.export.shards import ShardedWriter
from lightning_moe.export.uniform import is_cut
from lightning_moe.files import digest_of_tensors, folder_bytes, read_json, write_json
from lightning_moe.quantization.footprint import measure_footprint
from lightning_moe.quantization.stored import StoredTensor
from lightning_moe.renaming import bring_back, move_into_place
from lightning_moe.surgery.folder_cut import FolderCut
from lightning_moe.surgery.repair import LayerErrors, repair_table

log = logging.getLogger(__name__)

_GB = 1e9
_MODEL, _REPAIR = "model", "repair_"


@dataclass(frozen=True, kw_only=True)
class PartialFolder:
    """One pruned folder on its way.

    Args:
        cut: what becomes of the checkpoint.
        out: its final name.
        outline: the model that it will hold, on the meta device.
        processes: those that share the work.
    """

    cut: FolderCut
    out: Path
    outline: PreTrainedModel
    processes: Processes

    @property
    def path(self) -> Path:
        """Where it grows."""
        return self.out.with_name(f"{self.out.name}.partial")

    @cached_property
    def writer(self) -> ShardedWriter:
        """Of its shards."""
        return ShardedWriter(folder=self.path / _MODEL, names=self.cut.folder.decoder_names)

    @cached_property
    def stored(self) -> Sequence[StoredTensor]:
        """What will be in them."""
        return tuple(stored_tensors(self.outline))

    def open(self, *, repair: str, text: str, peak_bytes: int, workspace: Path, buffer_bytes: int) -> None:
        """Says what the job will take, and makes the working folders or takes up those of an interrupted run.

        Args:
            repair: what is repaired.
            text: digest of the text.
            peak_bytes: expected peak of memory.
            workspace: where the hidden states go.
            buffer_bytes: bytes of those.

        Raises:
            ValueError: the disk is too small, or an interrupted run had other settings.
        """
        told = ""
        with self.processes.together():
            if self.processes.rank == 0:
                told = self._check_disk(peak_bytes=peak_bytes, workspace=workspace, buffer_bytes=buffer_bytes)
        run = self._description(repair=repair, text=text)
        for path in dict.fromkeys([self.path, workspace]):
            another = {"another": "Name another `out`"} if path == self.path else {}
            Workspace.open(path, run=run, processes=self.processes, **another)
        if self.processes.rank == 0:
            log.info("%s", told)
            bring_back(self.writer.folder, self.out)
            self.writer.folder.mkdir(exist_ok=True)
            for left in self.writer.folder.glob(".*"):
                left.unlink()
        self.processes.gather(None)  # nobody writes before the folder is there

    def _description(self, *, repair: str, text: str) -> dict[str, str]:
        """What must be the same for the shards of an interrupted run to be of use."""
        packages = ("lightning_moe", "torch", "transformers", "bitsandbytes")
        cut = self.cut
        novices = {} if cut.novices is None else {str(index): rows for index, rows in enumerate(cut.novices.rows)}
        return {
            "command": "prune",
            "checkpoint": cut.folder.fingerprint,
            "dtype": cut.folder.dtype,
            "plan": "none" if cut.plan is None else cut.plan.digest,
            "quantize": "nf4" if cut.quantize else "none",
            "repair": repair,
            "novices": digest_of_tensors(novices) if novices else "none",
            "text": text,
            "device": torch.device(cut.device).type,
            "software": ", ".join(f"{name} {version(name)}" for name in packages),
        }

    def _check_disk(self, *, peak_bytes: int, workspace: Path, buffer_bytes: int) -> str:
        """What the job will take, in words."""
        done = [path.stat().st_size for path in self.writer.folder.glob("*.safetensors")]
        total = bytes_to_write(self.cut.folder, stored=self.stored)
        missing = max(0, total - sum(done))
        free = check_room(out=self.out, num_bytes=missing, workspace=workspace, buffer_bytes=buffer_bytes)
        return (
            f"Writing '{self.cut.folder.source}' layer by layer: expected peak memory {peak_bytes / _GB:.3g} GB beside "
            f"interpreter and libraries; {total / _GB:.3g} GB in {self.writer.num_shards} shards to '{self.out}' "
            f"({len(done)} are there), hidden states of {buffer_bytes / _GB:.3g} GB in '{workspace}'; "
            f"{free / _GB:.3g} GB free."
        )

    def keep_repair(self, index: int, found: LayerErrors) -> None:
        """Writes down the errors of one layer, for the table at the end."""
        numbers = [found.num_repaired, found.before, found.after]
        with _write_errors(self.path):
            write_json(self.path / f"{_REPAIR}{index:05d}.json", numbers)

    def finish(self, *, beside: Callable[[Path], object] | None) -> None:
        """Writes what is not a shard, and gives the folder its name."""
        with self.processes.together():
            if self.processes.rank == 0:
                with _write_errors(self.writer.folder):
                    self._complete(beside=beside)

    def _complete(self, *, beside: Callable[[Path], object] | None) -> None:
        folder, cut = self.writer.folder, self.cut
        write_configs(self.outline, folder=folder)
        self.writer.write_index()
        if beside is not None:
            beside(folder)
        packed = self.outline.config.quantization_config.packed_experts
        manifest = write_manifest(
            folder,
            format="nf4" if packed else "ragged",
            source=cut.folder.source,
            model=self.outline,
            plans=() if cut.plan is None else (cut.plan,),
            dropped=cut.folder.dropped,
        )
        carry_card(self.out, folder)
        write_card(folder, manifest=manifest, cut=is_cut(self.outline))
        numbers = [read_json(path, what="errors of a repair") for path in sorted(self.path.glob(f"{_REPAIR}*"))]
        if numbers:
            log.info("Repair of W_down, predicted error per token:\n%s", repair_table(numbers))
        move_into_place(folder, self.out)
        Workspace(path=self.path).remove()
        log.info(
            "Model written to '%s': %s bytes, tokenizer, manifest and card included; %s parameters.",
            self.out,
            f"{folder_bytes(self.out):,}",
            f"{measure_footprint(self.outline).stored_params:,}",
        )


@contextmanager
def _write_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"'{folder}' cannot be completed: {error}. Make room there and run the same command again: the shards that "
            "are whole are kept."
        ) from error
