"""The command `calibrate`."""

import logging

from lightning_moe.calibration.gradients import check_unpacked, collect_gradients
from lightning_moe.calibration.processes import Processes
from lightning_moe.calibration.streamed import collect_streamed
from lightning_moe.calibration.workspace import Workspace
from lightning_moe.commands._shared import (
    Device,
    check_writable,
    files_of,
    load_on,
    processes,
    resolve_device,
    working_folder,
)
from lightning_moe.export.apart import check_apart
from lightning_moe.export.folders import open_folder
from lightning_moe.models.discovery import moe_layers
from lightning_moe.models.loading import DtypeName
from lightning_moe.training.data import TextDataModule

log = logging.getLogger(__name__)


def calibrate(
    *,
    model: str,
    out: str,
    data: TextDataModule,
    dtype: DtypeName = "auto",
    moments: bool = True,
    gradients: bool = False,
    device: Device = "auto",
    workspace: str | None = None,
) -> None:
    """One forward pass over the calibration corpora: every statistic that any method needs, in one file.

    One decoder layer at a time is in memory, so the model may be larger than that. Interrupted and run again, it goes
    on after the last whole layer. Under torchrun the processes share the text.

    Args:
        model: Folder, `asset:small_moe` or hub name of the model: stock, cut, or packed to 4 bit.
        out: File to write (safetensors).
        data: The data module; its `calibration` corpora are used.
        dtype: Type of the weights during the pass; `auto` is the stored one.
        moments: Also gather what `mone`, `expert_sparsity` and novices need: sums of experts x hidden size numbers.
        gradients: Then also load the whole model and run backward through it, for the channel criteria `snip` and
            `taylor`: about twice the time again, not on 4-bit experts, and in one process.
        device: Where it runs; `auto` is the GPU if there is one.
        workspace: Folder for hidden states between layers and for finished layers, removed at the end; `OUT.partial`
            when not given.
    """
    check_apart(out, inputs=[model, *files_of(model)], within=False)
    check_writable(out)
    folder = open_folder(model, dtype=dtype)
    with processes(device) as group:
        if gradients:
            _check_gradients(group)
            check_unpacked(moe_layers(folder.model))
        space = working_folder(workspace, out=out)
        statistics = collect_streamed(
            folder,
            loaders=data.calibration_dataloaders(),
            workspace=space,
            moments=moments,
            device=resolve_device(device),
            processes=group,
        )
        with group.together():
            if group.rank == 0:
                statistics.save(out)
    if group.rank:
        return
    if gradients:
        log.info("Statistics of the forward pass written to %s; gradients follow.", out)
        loaded = load_on(model, dtype=dtype, device=device)
        statistics.with_sums(collect_gradients(loaded, loaders=data.calibration_dataloaders())).save(out)
    Workspace(path=space).remove()
    log.info("Statistics of corpora %s written to %s.", list(statistics.corpora), out)


def _check_gradients(group: Processes) -> None:
    if group.size > 1:
        raise ValueError(
            f"`gradients` runs in one process, got {group.size}. Start it without torchrun, or leave gradients out."
        )
