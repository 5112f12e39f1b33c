"""The command `prune`."""

import json
import logging
from typing import Literal

import torch

from lightning_moe.commands._shared import Device, load_on
from lightning_moe.export.huggingface import check_replaceable, save_ragged
from lightning_moe.models.loading import DtypeName, can_stream, read_config, torch_dtype
from lightning_moe.quantization.linears import quantize_model
from lightning_moe.quantization.nf4 import check_hidden_size
from lightning_moe.records import CalibrationStatistics, PrunePlan
from lightning_moe.surgery.cut import apply_plan
from lightning_moe.surgery.novices import Novices, mean_outputs
from lightning_moe.surgery.repair import has_rows_to_fit, plan_repair
from lightning_moe.surgery.streaming import quantize_folder
from lightning_moe.training.data import TextDataModule

log = logging.getLogger(__name__)


def prune(
    *,
    model: str,
    plan: str,
    out: str,
    data: TextDataModule,
    quantize: Literal["nf4", "none"] = "nf4",
    repair: bool | Literal["after_nf4"] = True,
    repair_memory_gb: float = 4.0,
    novices: str | None = None,
    dtype: DtypeName = "auto",
    device: Device = "auto",
) -> None:
    """Cut a model by a plan, repair it, pack it, and write a folder that stock `from_pretrained` loads.

    Without repair, a stock model goes to NF4 layer by layer: memory for the packed model and one layer is enough.

    Args:
        model: Folder, `asset:small_moe` or hub name of the model the plan was made for.
        plan: File written by `plan`.
        out: Folder to write.
        data: The data module; its `calibration` corpora are used by the repair.
        quantize: `nf4`, or `none` for a ragged folder in the model's own type.
        repair: Refit the down projections by least squares (a second calibration pass); `after_nf4` fits them to
            gate and up projections as 4 bit holds them, also where nothing is cut.
        repair_memory_gb: Memory for the Gram matrices; more passes where it does not suffice.
        novices: Statistics file of the model: experts that go as a whole leave their mean output there behind, and the
            router goes on choosing them (MoNE). Means over the corpora that the plan was made from. Nothing stays of
            them if not given, nor may it under a budget in bytes or stored parameters.
        dtype: Type of the weights.
        device: Where it runs; `auto` is the GPU if there is one. Packing layer by layer runs on the CPU.
    """
    decided = PrunePlan.load(plan)
    check_replaceable(out)
    if quantize == "nf4":
        check_hidden_size(decided.shape.hidden_size)
    _check_budget(decided, model=model, packs=quantize == "nf4", dtype=dtype, novices=novices is not None)
    after_nf4 = repair == "after_nf4"
    if after_nf4 and quantize != "nf4":
        raise ValueError("`repair: after_nf4` fits to 4-bit weights, got `quantize: none`. Set `repair` to true.")
    constants = None if novices is None else _constants(novices, plan=decided)
    wants_repair = bool(repair) and has_rows_to_fit(decided, after_nf4=after_nf4)
    if quantize == "nf4" and not wants_repair and constants is None and can_stream(model):
        loaded = quantize_folder(model, plan=decided, dtype=dtype)
    else:
        loaded = load_on(model, dtype=dtype, device=device)
        refit = None
        if wants_repair:
            loaders = data.calibration_dataloaders()
            refit = plan_repair(loaded, plan=decided, loaders=loaders, memory_gb=repair_memory_gb, after_nf4=after_nf4)
        apply_plan(loaded, plan=decided, repair=refit, novices=constants)
        if quantize == "nf4":
            quantize_model(loaded)
    save_ragged(loaded, out)
    data.tokenizer.save_pretrained(out)
    log.info("Pruned model written to %s.", out)


def _check_budget(plan: PrunePlan, *, model: str, packs: bool, dtype: DtypeName, novices: bool) -> None:
    """Refuses to write another folder than the one that the plan's budget was counted for."""
    budget = json.loads(plan.provenance.get("budget", "{}"))
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
    wanted, got = (budget["bits"], budget["dtype"]), (4 if packs or packed else 16, str(stored).removeprefix("torch."))
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
