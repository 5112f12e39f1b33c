"""The command `prune`."""

import logging
from typing import Literal

from lightning_moe.commands._shared import Device, load_on
from lightning_moe.export.huggingface import check_replaceable, save_ragged
from lightning_moe.models.loading import DtypeName, can_stream
from lightning_moe.quantization.linears import quantize_model
from lightning_moe.quantization.nf4 import check_hidden_size
from lightning_moe.records import PrunePlan
from lightning_moe.surgery.cut import apply_plan
from lightning_moe.surgery.repair import plan_repair
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
    repair: bool = True,
    repair_memory_gb: float = 4.0,
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
        repair: Refit the down projections by least squares (a second calibration pass).
        repair_memory_gb: Memory for the Gram matrices; more passes where it does not suffice.
        dtype: Type of the weights.
        device: Where it runs; `auto` is the GPU if there is one. Packing layer by layer runs on the CPU.
    """
    decided = PrunePlan.load(plan)
    check_replaceable(out)
    wants_repair = repair and decided.num_kept < decided.shape.num_channels
    if quantize == "nf4" and not wants_repair and can_stream(model):
        loaded = quantize_folder(model, plan=decided, dtype=dtype)
    else:
        loaded = load_on(model, dtype=dtype, device=device)
        if quantize == "nf4":
            check_hidden_size(decided.shape.hidden_size)
        refit = None
        if wants_repair:
            loaders = data.calibration_dataloaders()
            refit = plan_repair(loaded, plan=decided, loaders=loaders, memory_gb=repair_memory_gb)
        apply_plan(loaded, plan=decided, repair=refit)
        if quantize == "nf4":
            quantize_model(loaded)
    save_ragged(loaded, out)
    data.tokenizer.save_pretrained(out)
    log.info("Pruned model written to %s.", out)
