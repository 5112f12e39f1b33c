"""ExportPruned: write what the run made, reload it, compare."""

import logging
from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from callbacks._loaders import text_data
from callbacks._pruning import prunings
from callbacks._strategy import check_gatherable, gathered
from callbacks._trainer import find_callback, find_optional, language_model
from callbacks.recovery import Recovery
from lightning_moe.adapters.storage import AdapterDtype
from lightning_moe.export.deploy import export_model
from lightning_moe.export.formats import ExportFormat, check_formats, needs_adapters
from lightning_moe.export.result import ExportResult
from lightning_moe.locks import Lock
from lightning_moe.models.loading import DtypeName
from lightning_moe.renaming import make_folder
from lightning_moe.training.module import LanguageModelModule
from lightning_moe.training.sharding import is_sharded

log = logging.getLogger(__name__)
_LOCK = ".run.lock"


class ExportPruned(Callback):
    """After training, exports the model in one or more formats; each is reloaded and its logits compared.

    Args:
        folder: Where the exports go, one subfolder each.
        formats: `adapter` (base folder and PEFT adapter), `merged` (adapters merged, unpacked), `merged_nf4` (merged
            and packed again: what ships); without adapters `ragged` (unpacked), `nf4` (packed; the last), and in
            stock layout `uniform` (a model of one width), `expert_dropped` (equally many experts gone in each
            layer), `padded` (any) or `stock` (an uncut model). Null: the first and the third.
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
        self._lock: Lock | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before training: formats of adapters need a `Recovery` earlier in the list, shards a module of ours.

        From now on the folder is this run's: another one would replace its exports, or have its own replaced.
        """
        check_gatherable(trainer, pl_module)
        if needs_adapters(self.formats):
            find_callback(trainer, Recovery, before=self)
        if stage == "fit" and trainer.is_global_zero:
            self._lock = _reserved(self.folder)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The folder is free again."""
        self._release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The same after a failure."""
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.path.unlink(missing_ok=True)
            self._lock.release()
            self._lock = None
            if not any(self.folder.iterdir()):
                self.folder.rmdir()

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Rank 0 writes the folders; Lightning has moved the model to the CPU by now. FSDP2's shards are gathered."""
        model, recovery = language_model(pl_module), find_optional(trainer, Recovery)
        peft_model = None if recovery is None else recovery.peft_model
        if is_sharded(model):
            model, peft_model = gathered(trainer, pl_module)
        if model is None or not trainer.is_global_zero:
            return
        self.results = export_model(
            model,
            peft_model=peft_model,
            folder=self.folder,
            formats=self.formats,
            adapter_dtype=self.adapter_dtype,
            dtype=self.dtype,
            tokenizer=_tokenizer(trainer),
            source=_source(pl_module),
            plans=[plan for pruning in prunings(trainer) for plan in pruning.plans],
        )
        for result in self.results:
            log.info("Exported %s: %s", result.format, result.describe())


def _tokenizer(trainer: Trainer) -> PreTrainedTokenizerBase | None:
    data = text_data(trainer)
    return None if data is None else data.tokenizer


def _reserved(folder: Path) -> Lock:
    """The lock of a folder of exports."""
    try:
        make_folder(folder)
        return Lock.take(folder / _LOCK)
    except BlockingIOError as error:
        raise ValueError(
            f"Another run is going to export to '{folder}'. Wait for it, or name another `folder`."
        ) from error
    except OSError as error:
        raise ValueError(f"`folder` must be a folder that can be written to, got '{folder}': {error}.") from error


def _source(pl_module: LightningModule) -> str | None:
    """What a module of ours was loaded from; None of somebody else's, whose model says it itself."""
    if not isinstance(pl_module, LanguageModelModule):
        return None
    settings = pl_module.hparams
    shape = "random weights in the shape of " if settings.get("from_scratch") else ""
    return f"{shape}{settings['source']}"
