"""Teachers of a recovery: the unpruned model, the same packed to NF4 as it is loaded, or its logits on disk.

B sequences, S positions, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_moe.calibration.processes import ALONE, Processes
from lightning_moe.models.loading import DtypeName, can_stream, load_model
from lightning_moe.quantization.linears import quantize_model
from lightning_moe.surgery.cut import convert_experts
from lightning_moe.surgery.streaming import quantize_folder
from lightning_moe.training.batches import TEACHER_IDS, TEACHER_LOGPROBS, model_inputs
from lightning_moe.training.losses import distillation_loss, top_k_distillation_loss
from lightning_moe.training.node_loading import load_shared
from lightning_moe.training.teacher_logits import TeacherLogits

TeacherQuantize = Literal["nf4", "none"]
Batch = Mapping[str, Tensor]


class Teacher(Protocol):
    """What gives the targets of a batch."""

    def loss(self, student_BSV: Tensor, batch: Batch) -> Tensor:
        """Divergence of the student from the teacher, a scalar in nats per token with a label."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelTeacher:
    """A frozen model beside the student, whole in each process."""

    model: PreTrainedModel

    def loss(self, student_BSV: Tensor, batch: Batch) -> Tensor:
        """`KL(teacher || student)` over the whole vocabulary, a scalar in nats; the teacher runs now."""
        with torch.no_grad():
            teacher_BSV = self.model(**model_inputs(batch), use_cache=False).logits
        return distillation_loss(student_BSV, teacher_BSV, batch["labels"])


@dataclass(frozen=True, kw_only=True)
class StoredTeacher:
    """Logits on disk, which the data module puts into the batches."""

    def loss(self, student_BSV: Tensor, batch: Batch) -> Tensor:
        """KL over the stored tokens and a bucket of all others, a scalar in nats."""
        return top_k_distillation_loss(student_BSV, batch[TEACHER_IDS], batch[TEACHER_LOGPROBS], batch["labels"])


@dataclass(frozen=True, kw_only=True)
class TeacherSettings:
    """Which teacher, if any, and how much it counts.

    Args:
        source: folder, asset or hub name of the unpruned model.
        quantize: `nf4` packs it as it is loaded.
        logits: folder that `teach` wrote.
        weight: of the distillation loss; the next-token loss has the rest.

    Raises:
        ValueError: two kinds of teacher, `quantize` without a model, an unknown one, or a weight outside (0, 1].
    """

    source: str | None = None
    quantize: TeacherQuantize = "none"
    logits: str | None = None
    weight: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.weight <= 1:
            raise ValueError(f"`distillation` is the weight of the distillation loss, in (0, 1], got {self.weight}.")
        if self.quantize not in ("nf4", "none"):
            raise ValueError(f"`teacher_quantize` must be 'nf4' or 'none', got '{self.quantize}'.")
        if self.source is not None and self.logits is not None:
            raise ValueError(
                f"Give one teacher: `teacher: {self.source}` runs beside the student, `teacher_logits: {self.logits}` "
                "replaces it. Set the other one to null."
            )
        if self.quantize == "nf4" and self.source is None:
            raise ValueError("`teacher_quantize: nf4` packs a model that teaches: name it in `teacher`.")

    def open_logits(self) -> TeacherLogits | None:
        """The logits on disk, if these teach."""
        return None if self.logits is None else TeacherLogits(self.logits)

    def teacher_for(
        self,
        student: PreTrainedModel,
        *,
        dtype: DtypeName,
        device: torch.device,
        logits: TeacherLogits | None,
        processes: Processes = ALONE,
    ) -> Teacher | None:
        """The teacher, loaded and checked against the student; None where there is none.

        Args:
            student: the model that learns.
            dtype: type of the teacher's weights that are not packed.
            device: where it runs.
            logits: its logits on disk, if those teach.
            processes: each of them gets the teacher.

        Raises:
            ValueError: it is another model, or it cannot be loaded.
        """
        if logits is not None:
            logits.check_vocabulary(int(student.config.get_text_config().vocab_size))
            return StoredTeacher()
        if self.source is None:
            return None
        model = load_teacher(self.source, quantize=self.quantize, dtype=dtype, processes=processes)
        _check_same_model(model, student=student, source=self.source)
        return ModelTeacher(model=model.to(device))  # pyright: ignore[reportArgumentType]: transformers wraps `to`


def load_teacher(
    source: str, *, quantize: TeacherQuantize, dtype: DtypeName = "auto", processes: Processes = ALONE
) -> PreTrainedModel:
    """The unpruned model, frozen, in eval mode, on the CPU; the processes of a node share one copy.

    With `nf4` a stock folder is packed layer by layer: memory for the packed model and an eighth of a layer is enough.

    Raises:
        ValueError: see `load_shared` and `quantize_folder`.
    """
    pack = partial(_packed, source, dtype=dtype) if quantize == "nf4" else None
    model = load_shared(source, dtype=dtype, processes=processes, pack=pack)
    return model.eval().requires_grad_(requires_grad=False)


def _packed(source: str, *, dtype: DtypeName) -> PreTrainedModel:
    if can_stream(source):
        return quantize_folder(source, dtype=dtype)
    model = load_model(source, dtype=dtype)
    convert_experts(model)
    quantize_model(model)
    return model


def _check_same_model(teacher: PreTrainedModel, *, student: PreTrainedModel, source: str) -> None:
    """The teacher must be the student before it was cut: same family, depth, width and vocabulary."""
    mine, theirs = (model.config.get_text_config().to_dict() for model in (student, teacher))
    for name in ("model_type", "num_hidden_layers", "hidden_size", "vocab_size"):
        if mine[name] != theirs[name]:
            raise ValueError(
                f"`teacher: {source}` is not the unpruned model of this student: `{name}` is {theirs[name]} there and "
                f"{mine[name]} here. Name the model that was pruned, or leave `teacher` out."
            )
