"""Prune, repair and pack a checkpoint that need not fit in memory: one pass from a folder to a sharded folder.

C channels of a layer.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tqdm.auto import tqdm

from lightning_moe.assets import resolve_asset
from lightning_moe.calibration.gram import stream_grams
from lightning_moe.calibration.layer_walk import DecoderStep, LayerWalk
from lightning_moe.calibration.processes import ALONE, Processes
from lightning_moe.calibration.text import Batch
from lightning_moe.calibration.workspace import Workspace
from lightning_moe.export.apart import check_apart
from lightning_moe.export.costs import peak_without_repair, repair_costs
from lightning_moe.export.huggingface import check_replaceable
from lightning_moe.export.manifest import read_manifest
from lightning_moe.export.outline import outline_of
from lightning_moe.export.partial import PartialFolder
from lightning_moe.models.channel_experts import ChannelExperts
from lightning_moe.models.folders import LayerFolder
from lightning_moe.progress import hidden
from lightning_moe.quantization.nf4 import check_hidden_size
from lightning_moe.records import PrunePlan
from lightning_moe.surgery.folder_cut import FolderCut
from lightning_moe.surgery.novices import Novices
from lightning_moe.surgery.repair import (
    LayerErrors,
    experts_to_fit,
    has_rows_to_fit,
    place_in_layer,
    repair_columns,
    repair_layer,
)
from lightning_moe.surgery.streaming import check_plan

RepairKind = bool | Literal["after_nf4"]


def prune_folder(
    folder: LayerFolder,
    *,
    plan: PrunePlan | None,
    out: str | Path,
    quantize: bool,
    repair: RepairKind = False,
    novices: Novices | None = None,
    loaders: Mapping[str, Iterable[Batch]] | None = None,
    memory_gb: float | None = None,
    workspace: str | Path | None = None,
    device: str = "cpu",
    processes: Processes = ALONE,
    progress: bool = True,
    beside: Callable[[Path], object] | None = None,
) -> None:
    """What `plan_repair`, `apply_plan`, `quantize_model` and `save_ragged` write, with one decoder layer in memory.

    The tensors are the same, bit for bit, as of the model with ChannelExperts. The folder is made as `<out>.partial`
    and takes its name in one move when it is whole; an older model folder of that name is replaced. After an
    interruption the same call goes on with the first shard that is missing, and the result is the same.

    Args:
        folder: the checkpoint.
        plan: which channels stay; all without one.
        out: folder to write.
        quantize: put the model in NF4.
        repair: refit the down projections; `after_nf4` to gate and up rows in 4 bit.
        novices: what evicted experts leave behind.
        loaders: corpus name -> batches; only a repair reads them.
        memory_gb: GiB for the Gram matrices of a layer, which runs over the text several times where they do not
            suffice; an eighth of a decoder layer if not given.
        workspace: folder for the hidden states of a repair; `<out>.partial` if not given.
        device: where a layer is.
        processes: those that share the work; all see the same disk.
        progress: show a bar.
        beside: writes other files into the folder (a tokenizer's) before it takes its name.

    Raises:
        ValueError: `out` is the checkpoint itself or lies around it, the plan was made for another checkpoint, novices
            for another plan, the model cannot be packed, a repair has no text or is one after NF4 without NF4, the disk
            is too small, an interrupted run had other settings, or a file cannot be read or written.
    """
    out = Path(out)
    check_apart(out, inputs=[folder.source])
    check_replaceable(out)
    wanted = _checked_repair(plan, repair=repair, quantize=quantize)
    if wanted and not loaders:
        raise ValueError(f"`repair: {repair}` needs text, got none. Give `loaders`, or set `repair` to false.")
    with processes.together():
        _check(folder, plan=plan, quantize=quantize, novices=novices)
    cut = FolderCut(folder=folder, plan=plan, quantize=quantize, novices=novices, device=device)
    outline = outline_of(folder.model, plan=plan, quantize=quantize, novices=novices is not None)
    target = PartialFolder(cut=cut, out=out, outline=outline, processes=processes)
    job = _Job(cut=cut, target=target, repair=wanted, processes=processes, progress=progress)
    if wanted:
        walk = LayerWalk(
            folder,
            loaders=loaders or {},
            workspace=target.path if workspace is None else workspace,
            device=device,
            processes=processes,
            progress=progress,
            title="Pruning",
        )
        job.run_with_repair(walk, memory_gb=memory_gb)
    else:
        job.run()
    target.finish(beside=beside)
    if wanted and workspace is not None and processes.rank == 0 and Path(workspace).is_dir():
        Workspace(path=Path(workspace)).remove()


def _checked_repair(plan: PrunePlan | None, *, repair: RepairKind, quantize: bool) -> RepairKind:
    """The repair, if there is something to repair."""
    after_nf4 = repair == "after_nf4"
    if after_nf4 and not quantize:
        raise ValueError("`repair: after_nf4` fits to 4-bit weights, got `quantize: none`. Set `repair` to true.")
    return repair if repair and plan is not None and has_rows_to_fit(plan, after_nf4=after_nf4) else False


def _check(folder: LayerFolder, *, plan: PrunePlan | None, quantize: bool, novices: Novices | None) -> None:
    if quantize:
        check_hidden_size(int(folder.model.config.get_text_config().hidden_size))
    read_manifest(resolve_asset(folder.source))  # its words go into the new one
    if plan is None:
        return
    check_plan(folder, plan=plan)
    if novices is not None:
        novices.check_fits(plan)


@dataclass(frozen=True, kw_only=True)
class _Job:
    """The work on one folder."""

    cut: FolderCut
    target: PartialFolder
    repair: RepairKind
    processes: Processes
    progress: bool

    @property
    def names(self) -> list[str]:
        """The decoder layers."""
        return self.cut.folder.decoder_names

    def run(self) -> None:
        """Without repair: the processes take the shards in turn."""
        peak_bytes = peak_without_repair(self.cut.folder, stored=self.target.stored)
        self.target.open(repair="False", text="", peak_bytes=peak_bytes, workspace=self.target.path, buffer_bytes=0)
        missing = [index for index in range(self.target.writer.num_shards) if not self.target.writer.done(index)]
        own = list(self.processes.share(self.processes.gather(missing)[0]))
        disable = hidden(progress=self.progress and self.processes.rank == 0)
        with self.processes.together():
            for index in tqdm(own, desc="Pruning shards", disable=disable):
                self.write(index)

    def write(self, index: int) -> None:
        """One shard, straight from the checkpoint."""
        loading = self.cut.outside() if index == len(self.names) else self.cut.decoder(self.names[index])
        with loading as tensors:
            self.target.writer.write(index, tensors)

    def run_with_repair(self, walk: LayerWalk, *, memory_gb: float | None) -> None:
        """All processes run the text and share the experts; the first one writes."""
        plan, after_nf4 = self.cut.plan, self.repair == "after_nf4"
        assert plan is not None
        costs = repair_costs(walk, plan=plan, columns=repair_columns(plan, after_nf4=after_nf4), after_nf4=after_nf4)
        memory_gb = costs.memory_gb(memory_gb, layer_bytes=max(map(self.cut.folder.decoder_bytes, self.names)))
        self.target.open(
            repair=str(self.repair),
            peak_bytes=walk.peak_bytes(extra_bytes=costs.extra_bytes(memory_gb)),
            text=walk.digest,
            workspace=walk.workspace,
            buffer_bytes=walk.buffer_bytes,
        )
        missing = (index for index in range(len(self.names)) if not self.target.writer.done(index))
        walk.first = self.processes.gather(next(missing, len(self.names)))[0]
        for step in walk:
            found = self.repaired(step, num_tokens=sum(walk.num_tokens.values()), memory_gb=memory_gb)
            with self.processes.together():
                if self.processes.rank == 0:
                    self.write_repaired(step, found)
            del step, found  # they hold the layer, and the next one is about to be loaded
        with self.processes.together():
            if self.processes.rank == 0 and not self.target.writer.done(len(self.names)):
                self.write(len(self.names))

    def repaired(self, step: DecoderStep, *, num_tokens: int, memory_gb: float) -> LayerErrors | None:
        """Runs the text through a layer and fits its down rows, in place; None of a dense layer."""
        plan, layer, after_nf4 = self.cut.plan, step.moe, self.repair == "after_nf4"
        assert plan is not None
        if layer is None:
            if step.index + 1 < len(self.names):
                step.run()
            return None
        assert isinstance(layer.experts, ChannelExperts)
        keep_C = plan.keep[layer.index]
        grams = stream_grams(
            step,
            config=self.cut.folder.model.config,
            dtype=self.cut.folder.model.dtype,
            num_tokens=num_tokens,
            memory_gb=memory_gb,
            experts=experts_to_fit(plan, layer_index=layer.index, after_nf4=after_nf4),
            columns=repair_columns(plan, after_nf4=after_nf4),
            processes=self.processes,
        )
        return repair_layer(
            layer,
            grams=grams,
            keep_C=keep_C,
            place=place_in_layer(layer.experts, keep_C=keep_C),
            after_nf4=after_nf4,
            processes=self.processes,
        )

    def write_repaired(self, step: DecoderStep, found: LayerErrors | None) -> None:
        """The errors first: a layer whose shard is there is done."""
        if found is not None:
            self.target.keep_repair(step.index, found)
        self.target.writer.write(step.index, self.cut.loaded_decoder(step.name))
