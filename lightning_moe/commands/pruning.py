"""The command `prune`."""

from typing import Literal

import torch

from lightning_moe.commands._budgeting import noted_budget
from lightning_moe.commands._shared import Device, processes, resolve_device
from lightning_moe.export.apart import check_apart
from lightning_moe.export.folders import open_folder
from lightning_moe.export.huggingface import check_replaceable
from lightning_moe.export.streaming import prune_folder
from lightning_moe.export.tokenizer_files import save_tokenizer
from lightning_moe.models.loading import DtypeName, read_config, torch_dtype
from lightning_moe.quantization.nf4 import check_hidden_size
from lightning_moe.records import CalibrationStatistics, PrunePlan
from lightning_moe.surgery.novices import Novices, mean_outputs
from lightning_moe.surgery.repair import has_rows_to_fit
from lightning_moe.training.data import TextDataModule


def prune(
    *,
    model: str,
    plan: str,
    out: str,
    data: TextDataModule,
    quantize: Literal["nf4", "none"] = "nf4",
    repair: bool | Literal["after_nf4"] = True,
    repair_memory_gb: float | None = None,
    novices: str | None = None,
    dtype: DtypeName = "auto",
    device: Device = "auto",
    workspace: str | None = None,
) -> None:
    """Cut a model by a plan, repair it, pack it, and write a folder that stock `from_pretrained` loads.

    One decoder layer at a time is in memory, so the model may be larger than that. The folder grows as `OUT.partial`
    and takes its name when it is whole; interrupted and run again, the command goes on with the first missing shard.
    Under torchrun the processes share the work.

    Args:
        model: Folder, `asset:small_moe` or hub name of the model the plan was made for: stock, cut, or packed to 4 bit.
        plan: File written by `plan`.
        out: Folder to write.
        data: The data module; its `calibration` corpora are used by the repair.
        quantize: `nf4`, or `none` for a ragged folder in the model's own type.
        repair: Refit the down projections by least squares (a second calibration pass); `after_nf4` fits them to
            gate and up projections as 4 bit holds them, also where nothing is cut.
        repair_memory_gb: GiB for the Gram matrices of a layer, which runs over the text several times where they do
            not suffice; an eighth of a decoder layer if not given.
        novices: Statistics file of the model: experts that go as a whole leave their mean output there behind, and the
            router goes on choosing them (MoNE). Means over the corpora that the plan was made from. Nothing stays of
            them if not given, nor may it under a budget in bytes or stored parameters.
        dtype: Type of the weights; `auto` is the stored one.
        device: Where the layer at hand is; `auto` is the GPU if there is one.
        workspace: Folder for the hidden states of the repair, removed at the end; `OUT.partial` if not given.
    """
    decided = PrunePlan.load(plan)
    check_apart(out, inputs=[model, plan, novices])
    check_replaceable(out)
    _check_memory(repair_memory_gb)
    if quantize == "nf4":
        check_hidden_size(decided.shape.hidden_size)
    _check_budget(decided, model=model, packs=quantize == "nf4", dtype=dtype, novices=novices is not None)
    constants = None if novices is None else _constants(novices, plan=decided)
    wants_repair = bool(repair) and has_rows_to_fit(decided, after_nf4=repair == "after_nf4")
    with processes(device) as group:
        prune_folder(
            open_folder(model, dtype=dtype),
            plan=decided,
            out=out,
            quantize=quantize == "nf4",
            repair=repair,
            novices=constants,
            loaders=data.calibration_dataloaders() if wants_repair else None,
            memory_gb=repair_memory_gb,
            workspace=workspace,
            device=resolve_device(device),
            processes=group,
            beside=lambda made: save_tokenizer(data.tokenizer, folder=made),
        )


def _check_memory(memory_gb: float | None) -> None:
    if memory_gb is not None and not memory_gb > 0:
        raise ValueError(f"`repair_memory_gb` must be a number of GB above 0, got {memory_gb!r}.")


def _check_budget(plan: PrunePlan, *, model: str, packs: bool, dtype: DtypeName, novices: bool) -> None:
    """Refuses to write another folder than the one that the plan's budget was counted for."""
    budget = noted_budget(plan)
    counted = [name for name in ("bytes", "stored_params") if name in budget.get("asked", {})]
    if novices and counted:
        raise ValueError(
            f"The plan was made for a budget of {' and '.join(counted)}, and `novices` would come on top of it. Leave "
            "`novices` out, or plan by `prune_ratio`, `keep_ratio` or `active`."
        )
    if "bytes" not in counted or "bits" not in budget:
        return
    config, own = read_config(model), torch_dtype(dtype)
    packed = (config.to_dict().get("quantization_config") or {}).get("packed_experts", False)
    stored = own if isinstance(own, torch.dtype) else config.dtype or torch.float32
    wanted, got = (
        (budget["bits"], budget.get("dtype")),
        (4 if packs or packed else 16, str(stored).removeprefix("torch.")),
    )
    if wanted != got:
        raise ValueError(
            f"The plan's budget in bytes was counted in {wanted[0]} bit with other weights in {wanted[1]}, this would "
            f"write {got[0]} bit and {got[1]}. Set `quantize` and `dtype` as they were counted, or plan with `bits` "
            f"{got[0]} and `dtype` {got[1]}."
        )


def _constants(file: str, *, plan: PrunePlan) -> Novices:
    corpora = plan.provenance.get("corpora")
    return mean_outputs(
        CalibrationStatistics.load(file), plan=plan, corpora=None if corpora is None else corpora.split(", ")
    )
