"""`plan --fit_training`: which adapters a device can train."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lightning_moe.adapters.inject import AdapterConfig
from lightning_moe.allocation.uniform_sizes import UniformSizes
from lightning_moe.allocation.units import format_bytes, parse_bytes
from lightning_moe.quantization.size import Bits
from lightning_moe.reporting.table import Column, format_table
from lightning_moe.training.memory import Attempt, RecoveryMemory, RecoveryRun
from lightning_moe.training.optim import OptimizerName

RANKS = (32, 16, 8, 4, 2)
_PARTS = {
    "base": "frozen model",
    "norms": "norms that DoRA keeps",
    "adapters": "adapters, fp32",
    "gradients": "their gradients",
    "optimizer": "optimizer state",
    "activations": "activations kept",
    "working": "one layer in backward, or logits",
    "driver": "GPU context (assumed)",
}


@dataclass(frozen=True, kw_only=True)
class TrainingQuestion:
    """A recovery run that should fit a device; see `plan` for the settings."""

    fit_training: str | int
    sequence_length: int
    batch_size: int
    optimizer: OptimizerName
    gradient_checkpointing: bool
    router_rank: int
    attention_rank: int

    def answer(self, model: UniformSizes, *, width: int, bits: Bits) -> "TrainingAnswer":
        """Looks for the largest rank of `RANKS` that fits, or the most layers.

        Raises:
            ValueError: see `RecoveryMemory.search`.
        """
        run = RecoveryRun(
            sequence_length=self.sequence_length,
            batch_size=self.batch_size,
            optimizer=self.optimizer,
            gradient_checkpointing=self.gradient_checkpointing,
        )
        memory = RecoveryMemory(config=model.config, width=width, dtype=model.dtype, packed=bits == 4, run=run)
        adapter = AdapterConfig(router_rank=self.router_rank, attention_rank=self.attention_rank)
        tried = memory.search(parse_bytes(self.fit_training), ranks=RANKS, adapter=adapter)
        return TrainingAnswer(question=self, tried=tried, num_layers=memory.num_layers)


@dataclass(frozen=True, kw_only=True)
class TrainingAnswer:
    """What fits: the last of what was tried."""

    question: TrainingQuestion
    tried: Sequence[Attempt]
    num_layers: int

    def record(self) -> dict[str, Any]:
        """Plain types for a file."""
        adapter, table = self.tried[-1].adapter, self.tried[-1].table
        layers = range(self.num_layers) if adapter.layers is None else adapter.layers
        return asdict(self.question) | {
            "bytes": parse_bytes(self.question.fit_training),
            "expert_rank": adapter.expert_rank,
            "num_layers": self.num_layers,
            "layers": list(layers),
            "memory": asdict(table) | {"total": table.total},
            "totals": {_name(attempt): attempt.table.total for attempt in self.tried},
        }

    def text(self) -> str:
        """For people."""
        asked, chosen = self.question, self.tried[-1].adapter
        where = f"all {self.num_layers} MoE layers"
        if chosen.layers is not None:
            where = f"the top {len(chosen.layers)} of {self.num_layers} MoE layers (from layer {chosen.layers[0]} on)"
        columns = [Column(key="part", header="memory of a step", left=True)]
        columns += [Column(key=_name(attempt), header=_name(attempt), text=format_bytes) for attempt in self.tried]
        rows = [{"part": words} | self._cells(part) for part, words in _PARTS.items()]
        rows.append({"part": "in all"} | self._cells("total"))
        return "\n".join(
            [
                f"Recovery within {asked.fit_training}: DoRA of rank {chosen.expert_rank} on the experts and "
                f"{asked.router_rank} on the router of {where}, {asked.batch_size} x {asked.sequence_length} tokens, "
                f"{asked.optimizer}: {format_bytes(self.tried[-1].table.total)}.",
                "",
                format_table(rows, columns=columns),
            ]
        )

    def _cells(self, part: str) -> dict[str, int]:
        tables = {_name(attempt): attempt.table for attempt in self.tried}
        return {name: asdict(table).get(part, table.total) for name, table in tables.items()}


def _name(attempt: Attempt) -> str:
    layers = attempt.adapter.layers
    return f"rank {attempt.adapter.expert_rank}" + ("" if layers is None else f", {len(layers)} layers")
