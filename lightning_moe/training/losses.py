"""Losses of a language model whose memory does not grow with batch times vocabulary.

B sequences, S positions, V vocabulary, P = B * S, N positions that count, n of them at once, k tokens of the teacher.

The fp32 copies that a loss makes of `[B, S, V]` logits would be the largest tensors of a run (1.2 GB each at 2,048
tokens of a vocabulary of 151,936). Here they exist for `n` positions at once, in forward and, computed again, in
backward: at most eight tensors of `CHUNK_NUMBERS` fp32 numbers (16 MiB each), beside logits and their gradient.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_moe.calibration.processes import Processes

CHUNK_NUMBERS = 2**22

# (logits of n positions in fp32 [n, V], where these stand among the B * S positions [n]) -> summed loss
_LossOfChunk = Callable[[Tensor, Tensor], Tensor]


def next_token_loss(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """Mean cross entropy in nats of the next token, over positions whose next token has a label; 0 if none has.

    Args:
        logits_BSV: logits that learn, in any float type.
        labels_BS: tokens, not shifted; -100 does not count.

    Examples:
        >>> logits_BSV, labels_BS = torch.zeros(1, 3, 4), torch.tensor([[0, 1, -100]])
        >>> round(next_token_loss(logits_BSV, labels_BS).item(), 4)  # log 4: four tokens, all alike
        1.3863
    """
    next_P = _next_labels(labels_BS)

    def loss_of(logits_nV: Tensor, position_n: Tensor) -> Tensor:
        return F.cross_entropy(logits_nV, next_P[position_n], reduction="sum")

    return _mean_over_positions(logits_BSV, next_P, loss_of=loss_of)


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
    teacher_PV = teacher_BSV.detach().flatten(0, 1)

    def loss_of(student_nV: Tensor, position_n: Tensor) -> Tensor:
        teacher_nV = teacher_PV[position_n].float().log_softmax(-1)
        probability_nV = teacher_nV.exp()
        # A token that the teacher rules out (-inf) counts 0, and not 0 times infinity.
        return (probability_nV * (teacher_nV - student_nV.log_softmax(-1)).masked_fill(probability_nV == 0, 0.0)).sum()

    return _mean_over_positions(student_BSV, _next_labels(labels_BS), loss_of=loss_of)


def top_k_distillation_loss(
    student_BSV: Tensor, token_BSk: Tensor, log_probability_BSk: Tensor, labels_BS: Tensor
) -> Tensor:
    """KL(teacher || student) over k tokens and one bucket for all others, in nats, mean over positions with a label.

    `sum_i p_i log(p_i / q_i) + r log(r / s)` with `r = 1 - sum_i p_i`, `s = 1 - sum_i q_i`: by the log-sum inequality a
    lower bound of the full divergence, which it equals at k = V.

    Args:
        student_BSV: logits that learn.
        token_BSk: tokens the teacher's probabilities belong to, different ones in each position.
        log_probability_BSk: their log-probabilities.
        labels_BS: tokens, not shifted; -100 does not count.

    Raises:
        ValueError: targets of other rows than the student's.
    """
    if token_BSk.shape[:2] != student_BSV.shape[:2] or token_BSk.shape[-1] > student_BSV.shape[-1]:
        raise ValueError(
            f"Targets {tuple(token_BSk.shape)} do not fit the student's logits {tuple(student_BSV.shape)}: "
            "`teacher_logits` must be of these rows and this vocabulary."
        )
    token_Pk, target_Pk = token_BSk.flatten(0, 1), log_probability_BSk.flatten(0, 1)

    def loss_of(student_nV: Tensor, position_n: Tensor) -> Tensor:
        return _bucketed_kl(student_nV, token_Pk[position_n].long(), target_Pk[position_n].float())

    return _mean_over_positions(student_BSV, _next_labels(labels_BS), loss_of=loss_of)


def _bucketed_kl(student_nV: Tensor, token_nk: Tensor, target_nk: Tensor) -> Tensor:
    total_n1 = student_nV.logsumexp(-1, keepdim=True)
    p_nk = target_nk.exp()
    difference_nk = target_nk - student_nV.gather(-1, token_nk) + total_n1
    loss = (p_nk * difference_nk.masked_fill(p_nk == 0, 0.0)).sum()
    if token_nk.shape[-1] == student_nV.shape[-1]:  # nothing is left for the bucket
        return loss
    # From the logits themselves: 1 - sum would lose the digits of a small rest.
    rest_n = student_nV.scatter(-1, token_nk, -torch.inf).logsumexp(-1) - total_n1.squeeze(-1)
    r_n = (1 - p_nk.sum(-1)).clamp_min(0)
    return loss + (torch.xlogy(r_n, r_n) - r_n * rest_n).sum()


def weight_among_processes(labels_BS: Tensor) -> Tensor | float:
    """This process's positions with a label, over the mean of all processes'; 1 where there is one process.

    Distributed strategies average over processes. A mean over positions times this weight becomes there the mean over
    the positions of all processes, also where prompts and padding leave them unequal numbers. All processes call it.
    """
    processes = Processes.of_default_group()
    if processes.size == 1:
        return 1.0
    count = (labels_BS[:, 1:] != -100).sum()
    total = count.clone()
    processes.sum_(total)
    return count * processes.size / total.clamp_min(1)


def _next_labels(labels_BS: Tensor) -> Tensor:
    """The label of each position's next token, `[B * S]`; the last position has none."""
    return F.pad(labels_BS[:, 1:], (0, 1), value=-100).flatten()


def _mean_over_positions(logits_BSV: Tensor, next_P: Tensor, *, loss_of: _LossOfChunk) -> Tensor:
    position_N = (next_P != -100).nonzero().flatten()
    return _ChunkedSum.apply(logits_BSV, position_N, loss_of) / max(len(position_N), 1)


class _ChunkedSum(torch.autograd.Function):
    """Sum of a loss over positions, some at once; backward computes them again, so that nothing is kept between."""

    @staticmethod
    def forward(ctx: Any, logits_BSV: Tensor, position_N: Tensor, loss_of: _LossOfChunk) -> Tensor:
        ctx.save_for_backward(logits_BSV, position_N)
        ctx.loss_of = loss_of
        logits_PV = logits_BSV.flatten(0, 1)
        total = torch.zeros((), device=logits_BSV.device)
        for position_n in _chunks(position_N, vocabulary=logits_BSV.shape[-1]):
            total += loss_of(logits_PV[position_n].float(), position_n)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        logits_BSV, position_N = ctx.saved_tensors
        logits_PV = logits_BSV.flatten(0, 1)
        gradient_PV = torch.zeros_like(logits_PV)
        for position_n in _chunks(position_N, vocabulary=logits_BSV.shape[-1]):
            with torch.enable_grad():
                logits_nV = logits_PV[position_n].float().requires_grad_()
                loss = ctx.loss_of(logits_nV, position_n) * gradients[0]
            gradient_PV[position_n] = torch.autograd.grad(loss, logits_nV)[0].to(gradient_PV.dtype)
        return gradient_PV.view_as(logits_BSV), None, None


def _chunks(position_N: Tensor, *, vocabulary: int) -> tuple[Tensor, ...]:
    """Positions in pieces of `CHUNK_NUMBERS` logits."""
    return position_N.split(max(1, CHUNK_NUMBERS // vocabulary)) if len(position_N) else ()
