"""Distillation against hand arithmetic and against PyTorch."""

import math

import pytest
import torch

from lightning_moe.training.losses import distillation_loss

# B sequences, S positions, V vocabulary


def test_kl_by_hand_over_the_positions_with_a_label():
    # One sequence of three tokens, two classes; position 0 predicts token 1 (counts), position 1 token 2 (-100).
    # Teacher (1/4, 3/4), student (1/2, 1/2): 1/4 ln(1/2) + 3/4 ln(3/2) = -0.173287 + 0.304099 = 0.130812.
    teacher = torch.tensor([[[0.25, 0.75], [0.9, 0.1], [0.5, 0.5]]]).log()
    student = torch.zeros(1, 3, 2)
    labels = torch.tensor([[0, 1, -100]])
    expected = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert distillation_loss(student, teacher, labels).item() == pytest.approx(expected, abs=1e-6)
    assert expected == pytest.approx(0.130812, abs=1e-6)


def test_zero_for_equal_logits_and_gradient_only_to_the_student():
    torch.manual_seed(0)
    logits_BSV, labels_BS = torch.randn(2, 5, 7, requires_grad=True), torch.randint(0, 7, (2, 5))
    assert distillation_loss(logits_BSV, logits_BSV, labels_BS).item() == pytest.approx(0, abs=1e-6)
    teacher_BSV = torch.randn(2, 5, 7, requires_grad=True)
    distillation_loss(logits_BSV, teacher_BSV, labels_BS).backward()
    # d KL / d logits = (softmax(student) - softmax(teacher)) / positions; the last position predicts nothing.
    expected_BSV = (logits_BSV.softmax(-1) - teacher_BSV.softmax(-1)) / 8
    expected_BSV[:, -1] = 0
    assert torch.allclose(logits_BSV.grad, expected_BSV, atol=1e-6)
    assert teacher_BSV.grad is None


def test_another_vocabulary_is_refused():
    with pytest.raises(ValueError, match=r"\(1, 2, 5\) do not fit the student's \(1, 2, 4\).*unpruned model"):
        distillation_loss(torch.zeros(1, 2, 4), torch.zeros(1, 2, 5), torch.zeros(1, 2, dtype=torch.int64))
