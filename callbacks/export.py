"""ExportPruned: write what the run made, reload it, compare."""

import logging
from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from typing_extensions import override

from callbacks._loaders import text_data
from callbacks._strategy import check_gatherable, gathered
from callbacks._trainer import find_callback, find_optional, language_model
from callbacks.recovery import Recovery
from lightning_moe.adapters.storage import AdapterDtype
from lightning_moe.export.deploy import ExportFormat, ExportResult, check_formats, export_model, needs_adapters
from lightning_moe.models.loading import DtypeName
from lightning_moe.training.sharding import is_sharded

log = logging.getLogger(__name__)


class ExportPruned(Callback):
    """After training, exports the model in one or more formats; each is reloaded and its logits compared.

    Args:
        folder: Where the exports go, one subfolder each.
        formats: `adapter` (base folder and PEFT adapter), `merged` (adapters merged, unpacked), `merged_nf4` (merged
            and packed again: what ships), `ragged` (the model as it is, without adapters), `padded` (stock layout),
            `stock` (an uncut model in stock layout), `nf4` (packed, without adapters; the last). Null: the first and
            the third.
        adapter_dtype: Type of the stored adapter; `float16` halves the file.
        dtype: Stored type of unpacked matrices such as the embeddings; `auto` keeps the model's.
    """

    def __init__(
        self,
        *,
        folder: str,
        formats: list[ExportFormat] | None = None,
        adapter_dtype: AdapterDtype = "float32",
        dtype: DtypeName = "auto",
    ) -> None:
        self.folder = Path(folder)
        self.formats: list[ExportFormat] = check_formats(["adapter", "merged_nf4"] if formats is None else formats)
        self.dtype: DtypeName = dtype
        self.adapter_dtype: AdapterDtype = adapter_dtype
        self.results: list[ExportResult] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before training: formats of adapters need a `Recovery` earlier in the list, shards a module of ours."""
        check_gatherable(trainer, pl_module)
        if needs_adapters(self.formats):
            find_callback(trainer, Recovery, before=self)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Rank 0 writes the folders; Lightning has moved the model to the CPU by now. FSDP2's shards are gathered."""
        model, recovery = language_model(pl_module), find_optional(trainer, Recovery)
        peft_model = None if recovery is None else recovery.peft_model
        if is_sharded(model):
            model, peft_model = gathered(trainer, pl_module)
        if model is None or not trainer.is_global_zero:
            return
        data = text_data(trainer)
        self.results = export_model(
            model,
            peft_model=peft_model,
            folder=self.folder,
            formats=self.formats,
            adapter_dtype=self.adapter_dtype,
            dtype=self.dtype,
            tokenizer=None if data is None else data.tokenizer,
        )
        for result in self.results:
            log.info("Exported %s: %s", result.format, result.describe())
