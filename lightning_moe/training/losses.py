"""Losses of recovery.  B sequences, S positions, V vocabulary, N positions that count."""

from torch import Tensor
from torch.nn import functional as F


def distillation_loss(student_BSV: Tensor, teacher_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """`KL(teacher || student)` in nats, mean over positions whose next token has a label (Hinton et al. 2015, T = 1).

    Args:
        student_BSV: logits that learn.
        teacher_BSV: logits of the unpruned model; no gradient goes there.
        labels_BS: tokens, not shifted; -100 does not count.

    Raises:
        ValueError: the vocabularies differ.
    """
    if student_BSV.shape != teacher_BSV.shape:
        raise ValueError(
            f"Teacher logits {tuple(teacher_BSV.shape)} do not fit the student's {tuple(student_BSV.shape)}: "
            "`teacher` must be the unpruned model of the same vocabulary."
        )
    counted_BS = labels_BS[:, 1:] != -100
    student_NV = student_BSV[:, :-1][counted_BS].float().log_softmax(-1)
    teacher_NV = teacher_BSV[:, :-1][counted_BS].detach().float().log_softmax(-1)
    return F.kl_div(student_NV, teacher_NV, reduction="batchmean", log_target=True)
