"""The command `prune`."""

import logging
from typing import Literal

from lightning_moe.commands._shared import Device, load_on
from lightning_moe.export.huggingface import check_replaceable, save_ragged
from lightning_moe.models.loading import DtypeName, can_stream
from lightning_moe.quantization.linears import quantize_model
from lightning_moe.quantization.nf4 import check_hidden_size
from lightning_moe.records import CalibrationStatistics, PrunePlan
from lightning_moe.surgery.cut import apply_plan
from lightning_moe.surgery.novices import mean_outputs
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
            router goes on choosing them (MoNE). Nothing stays of them if not given.
        dtype: Type of the weights.
        device: Where it runs; `auto` is the GPU if there is one. Packing layer by layer runs on the CPU.
    """
    decided = PrunePlan.load(plan)
    check_replaceable(out)
    after_nf4 = repair == "after_nf4"
    if after_nf4 and quantize != "nf4":
        raise ValueError("`repair: after_nf4` fits to 4-bit weights, got `quantize: none`. Set `repair` to true.")
    constants = None if novices is None else mean_outputs(CalibrationStatistics.load(novices), plan=decided)
    wants_repair = bool(repair) and has_rows_to_fit(decided, after_nf4=after_nf4)
    if quantize == "nf4" and not wants_repair and constants is None and can_stream(model):
        loaded = quantize_folder(model, plan=decided, dtype=dtype)
    else:
        loaded = load_on(model, dtype=dtype, device=device)
        if quantize == "nf4":
            check_hidden_size(decided.shape.hidden_size)
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
