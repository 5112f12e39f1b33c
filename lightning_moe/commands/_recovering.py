"""Short recoveries within a comparison: DoRA on 4-bit rows, and on the unpruned model as their control."""

import math
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lightning import Trainer, seed_everything

from callbacks import ExportPruned, Recovery
from lightning_moe.adapters.inject import AdapterConfig
from lightning_moe.evaluation.compare import CONTROL, Comparison, Row, StageSpec
from lightning_moe.evaluation.compare.digests import settings_digest, text_digest
from lightning_moe.training.data import TextDataModule
from lightning_moe.training.module import RecoveryModule

_SEEDS = 2**32
_INHERITED = ("method", "settings", "ratio", "bits", "repair", "sample", "calibrations", "novices", "export")


@dataclass(frozen=True, kw_only=True)
class ShortRecovery:
    """Trains adapters on some rows, and on the unpruned model in 4 bit: the control, on the same tokens.

    Args:
        rows: Names of rows in 4 bit.
        steps: Optimizer steps of `data.batch_size` rows of the `train` corpora.
        expert_learning_rate: Peak rate of the experts' adapters.
        router_learning_rate: Peak rate of the routers' adapters.
        attention_learning_rate: Peak rate of attention adapters, where there are any.
        adapter: Ranks of the adapters.
        distillation: Weight of the loss against the dense model's predictions; 0 loads no teacher.
        seed: Of adapters and reading order.
    """

    rows: list[str]
    steps: int
    expert_learning_rate: float = 1e-4
    router_learning_rate: float = 1e-6
    attention_learning_rate: float = 1e-4
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    distillation: float = 0.0
    seed: int = 0

    def check(self, specs: Sequence[StageSpec]) -> None:
        """Refuses rows that are not there or not in 4 bit, and lacks of their control, before anything runs.

        Raises:
            ValueError: with their names.
        """
        for name in ("expert_learning_rate", "router_learning_rate", "attention_learning_rate"):
            rate = vars(self)[name]
            if not (math.isfinite(rate) and rate >= 0):
                raise ValueError(f"`recovery.{name}` must be a finite number >= 0, got {rate}.")
        if not 0 <= self.seed < _SEEDS:
            raise ValueError(f"`recovery.seed` must be from 0 to {_SEEDS - 1}, got {self.seed}.")
        if not 0 <= self.distillation <= 1:
            raise ValueError(f"`recovery.distillation` must be in [0, 1], got {self.distillation}.")
        if not self.rows or self.steps < 1:
            raise ValueError(f"`recovery` needs names in `rows` and `steps` >= 1, got {self.rows} and {self.steps}.")
        known = [spec.name for spec in specs if spec.bits == 4]
        unknown = sorted(set(self.rows) - set(known))
        if unknown:
            raise ValueError(f"`recovery.rows` must name rows in 4 bit, got {unknown}; there are {known}.")
        control = [spec for spec in specs if spec.name == CONTROL.name and spec.bits == 4 and not spec.requested_ratio]
        if not control:
            raise ValueError(
                f"`recovery` needs the unpruned model in 4 bit as its control, under the name '{CONTROL.name}': add it "
                "to `stages` with `prune_ratio: 0` and `bits: 4`."
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class RecoveryRun:
    """Trains the rows of one comparison.

    Args:
        settings: what to train.
        comparison: whose rows they are; their models must have been kept.
        data: with `train` corpora.
    """

    settings: ShortRecovery
    comparison: Comparison
    data: TextDataModule

    def rows(self, made: Sequence[Row]) -> Iterator[Row]:
        """The recovered rows, the control first."""
        by_name = {row["name"]: row for row in made}
        text = text_digest({"train": self.data.train_dataloader()})
        for name in dict.fromkeys([CONTROL.name, *self.settings.rows]):
            yield self._recovered(by_name[name], text=text)

    def _recovered(self, row: Row, *, text: str) -> Row:
        settings = {key: value for key, value in asdict(self.settings).items() if key != "rows"}
        digest = settings_digest({"row": row["digest"], "text": text} | settings)
        columns = {key: row[key] for key in _INHERITED if key in row}
        columns |= {"name": f"{row['name']}_recovered", "recovered": True, "steps": self.settings.steps}
        book = self.comparison.book
        known = book.find(columns, digest=digest) if self.comparison.reuse else None
        return known or book.add(columns, self._measured(row, name=columns["name"]), digest=digest)

    def _measured(self, row: Row, *, name: str) -> Row:
        """Trains, exports, evaluates what lies on disk."""
        folder, started = self.comparison.model_folder(name), time.perf_counter()
        export = ExportPruned(folder=str(folder), formats=["adapter"], adapter_dtype="float16", dtype="bfloat16")
        self._train(self.comparison.model_folder(row["name"]), export=export)
        (result,) = export.results
        try:
            return self.comparison.measuring.of_folder(
                name,
                folder=result.base,
                adapter=result.adapter,
                prune_ratio=row["prune_ratio"],
                seconds=row["seconds"] + time.perf_counter() - started,
            )
        finally:
            if name not in self.comparison.keep:
                shutil.rmtree(folder, ignore_errors=True)

    def _train(self, source: Path, *, export: ExportPruned) -> None:
        asked = self.settings
        seed_everything(asked.seed, verbose=False)
        module = RecoveryModule(
            source=str(source),
            dtype=self.comparison.measures.dtype,
            expert_learning_rate=asked.expert_learning_rate,
            router_learning_rate=asked.router_learning_rate,
            attention_learning_rate=asked.attention_learning_rate,
            gradient_checkpointing=False,
            **({"teacher": self.comparison.source, "distillation": asked.distillation} if asked.distillation else {}),
        )
        trainer = Trainer(
            accelerator="cpu" if str(self.comparison.measures.device) == "cpu" else "gpu",
            devices=1,
            max_steps=asked.steps,
            gradient_clip_val=0.5,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            callbacks=[Recovery(adapter=asked.adapter), export],
        )
        trainer.fit(module, datamodule=self.data)
