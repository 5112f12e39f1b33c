"""Losses against hand arithmetic, against PyTorch over the whole vocabulary, and the memory they take."""

import math

import pytest
import torch
from torch.nn import functional as F

from lightning_moe.training import losses
from lightning_moe.training.losses import distillation_loss, next_token_loss, top_k_distillation_loss
from scripts.benchmarking import peak_bytes

# B sequences, S positions, V vocabulary, k tokens of the teacher

MIB = 2**20


@pytest.fixture(params=[1, 3, 1000], ids=lambda rows: f"{rows} positions at once")
def chunks(request, monkeypatch):
    """A chunk of so many positions of a vocabulary of 11."""
    monkeypatch.setattr(losses, "CHUNK_NUMBERS", 11 * request.param)


def problem(*, dtype=torch.float32, vocabulary=11):
    """Student and teacher logits of 2 x 6 positions, and labels, some of which do not count."""
    generator = torch.Generator().manual_seed(0)
    student_BSV = (3 * torch.randn(2, 6, vocabulary, generator=generator)).to(dtype).requires_grad_()
    teacher_BSV = (3 * torch.randn(2, 6, vocabulary, generator=generator)).to(dtype)
    labels_BS = torch.randint(0, vocabulary, (2, 6), generator=generator)
    labels_BS[0, 2] = labels_BS[1, 5] = -100
    return student_BSV, teacher_BSV, labels_BS


def top(teacher_BSV, k):
    values_BSk, token_BSk = teacher_BSV.float().log_softmax(-1).topk(k, dim=-1)
    return token_BSk, values_BSk


def naive_kl(student_BSV, teacher_BSV, labels_BS):
    losses_of_positions = []
    for row in range(len(labels_BS)):
        for position in range(labels_BS.shape[1] - 1):
            if labels_BS[row, position + 1] != -100:
                p, q = teacher_BSV[row, position].softmax(-1), student_BSV[row, position].softmax(-1)
                losses_of_positions.append((p * (p / q).log()).sum())
    return torch.stack(losses_of_positions).mean()


def naive_top_k(student_BSV, token_BSk, log_prob_BSk, labels_BS):
    """Probabilities written out, the bucket by subtraction."""
    losses_of_positions = []
    for row in range(len(labels_BS)):
        for position in range(labels_BS.shape[1] - 1):
            if labels_BS[row, position + 1] != -100:
                p = log_prob_BSk[row, position].exp()
                q = student_BSV[row, position].softmax(-1)[token_BSk[row, position]]
                rest = (1 - p.sum()) * ((1 - p.sum()) / (1 - q.sum())).log()
                losses_of_positions.append((p * (p / q).log()).sum() + rest)
    return torch.stack(losses_of_positions).mean()


def gradient_of(loss, student_BSV):
    return torch.autograd.grad(loss, student_BSV)[0]


def test_kl_by_hand_over_the_positions_with_a_label():
    # One sequence of three tokens, two classes; position 0 predicts token 1 (counts), position 1 token 2 (-100).
    # Teacher (1/4, 3/4), student (1/2, 1/2): 1/4 ln(1/2) + 3/4 ln(3/2) = -0.173287 + 0.304099 = 0.130812.
    teacher = torch.tensor([[[0.25, 0.75], [0.9, 0.1], [0.5, 0.5]]]).log()
    student = torch.zeros(1, 3, 2)
    labels = torch.tensor([[0, 1, -100]])
    expected = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert distillation_loss(student, teacher, labels).item() == pytest.approx(expected, abs=1e-6)
    assert expected == pytest.approx(0.130812, abs=1e-6)


def test_top_k_by_hand():
    # Teacher (1/2, 1/4, 1/8, 1/8), student uniform, k = 1: 1/2 ln(2) + 1/2 ln(2/3) = 0.346574 - 0.202733 = 0.143841.
    teacher_BSV = torch.tensor([[[0.5, 0.25, 0.125, 0.125]] * 2]).log()
    student_BSV, labels_BS = torch.zeros(1, 2, 4), torch.tensor([[0, 1]])
    assert top_k_distillation_loss(student_BSV, *top(teacher_BSV, 1), labels_BS).item() == pytest.approx(
        0.143841, abs=1e-6
    )
    # k = 2: 1/2 ln(2) + 1/4 ln(1) + 1/4 ln(1/2) = 0.346574 - 0.173287.
    assert top_k_distillation_loss(student_BSV, *top(teacher_BSV, 2), labels_BS).item() == pytest.approx(
        0.173287, abs=1e-6
    )


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_next_token_loss_is_pytorchs(dtype):
    student_BSV, _, labels_BS = problem(dtype=dtype)
    expected = F.cross_entropy(student_BSV[:, :-1].flatten(0, 1).float(), labels_BS[:, 1:].flatten())
    loss = next_token_loss(student_BSV, labels_BS)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient_of(loss, student_BSV), gradient_of(expected, student_BSV))


@pytest.mark.usefixtures("chunks")
def test_divergences_and_gradients_are_those_of_a_loop():
    student_BSV, teacher_BSV, labels_BS = problem()
    pairs = [(distillation_loss(student_BSV, teacher_BSV, labels_BS), naive_kl(student_BSV, teacher_BSV, labels_BS))]
    for k in (1, 4, 10):
        targets = top(teacher_BSV, k)
        mine = top_k_distillation_loss(student_BSV, *targets, labels_BS)
        pairs.append((mine, naive_top_k(student_BSV, *targets, labels_BS)))
    for loss, expected in pairs:
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        mine, theirs = gradient_of(2 * loss, student_BSV), gradient_of(2 * expected, student_BSV)
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
        assert mine[:, -1].count_nonzero() == 0


def test_top_k_is_a_lower_bound_that_rises_to_the_whole_divergence():
    student_BSV, teacher_BSV, labels_BS = problem()
    whole = distillation_loss(student_BSV, teacher_BSV, labels_BS)
    bounds = [top_k_distillation_loss(student_BSV, *top(teacher_BSV, k), labels_BS) for k in range(1, 12)]
    assert all(lower <= upper + 1e-6 for lower, upper in zip(bounds, [*bounds[1:], whole], strict=True))
    assert bounds[0] < 0.9 * whole
    torch.testing.assert_close(bounds[-1], whole)
    mine, theirs = gradient_of(bounds[-1], student_BSV), gradient_of(whole, student_BSV)
    torch.testing.assert_close(mine, theirs)


def test_zero_for_equal_logits_and_gradient_only_to_the_student():
    torch.manual_seed(0)
    logits_BSV, labels_BS = torch.randn(2, 5, 7, requires_grad=True), torch.randint(0, 7, (2, 5))
    assert distillation_loss(logits_BSV, logits_BSV, labels_BS).item() == pytest.approx(0, abs=1e-6)
    top_3 = top(logits_BSV.detach(), 3)
    assert top_k_distillation_loss(logits_BSV, *top_3, labels_BS).item() == pytest.approx(0, abs=1e-6)
    teacher_BSV = torch.randn(2, 5, 7, requires_grad=True)
    distillation_loss(logits_BSV, teacher_BSV, labels_BS).backward()
    # d KL / d logits = (softmax(student) - softmax(teacher)) / positions; the last position predicts nothing.
    expected_BSV = (logits_BSV.softmax(-1) - teacher_BSV.softmax(-1)) / 8
    expected_BSV[:, -1] = 0
    assert torch.allclose(logits_BSV.grad, expected_BSV, atol=1e-6)
    assert teacher_BSV.grad is None


@pytest.mark.parametrize("gap", [30.0, 300.0])
def test_a_certain_teacher_gives_finite_gradients(gap):
    # All of the mass on one token, in the teacher and in the student: the bucket holds next to nothing, or nothing.
    student_BSV = torch.tensor([[[gap, 0.0, 0.0], [0.0, gap, 0.0]]], requires_grad=True)
    teacher_BSV, labels_BS = torch.tensor([[[gap, 0.0, 0.0]] * 2]), torch.tensor([[0, 0]])
    for k in (1, 2, 3):
        loss = top_k_distillation_loss(student_BSV, *top(teacher_BSV, k), labels_BS)
        assert loss.item() == pytest.approx(0, abs=1e-5)
        assert gradient_of(loss, student_BSV).isfinite().all()


def test_half_precision_targets_cost_little():
    student_BSV, teacher_BSV, labels_BS = problem()
    token_BSk, log_prob_BSk = top(teacher_BSV, 4)
    exact = top_k_distillation_loss(student_BSV, token_BSk, log_prob_BSk, labels_BS)
    stored = top_k_distillation_loss(student_BSV, token_BSk.to(torch.int16), log_prob_BSk.half(), labels_BS)
    assert stored.item() == pytest.approx(exact.item(), rel=2e-3)


def test_no_position_that_counts_is_no_loss():
    student_BSV, teacher_BSV, labels_BS = problem()
    labels_BS[:] = -100
    for loss in (next_token_loss(student_BSV, labels_BS), distillation_loss(student_BSV, teacher_BSV, labels_BS)):
        assert loss.item() == 0
        assert gradient_of(loss, student_BSV).count_nonzero() == 0


def test_autocast_does_not_round_the_losses():
    student_BSV, teacher_BSV, labels_BS = problem(dtype=torch.bfloat16)
    plain = distillation_loss(student_BSV, teacher_BSV, labels_BS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(distillation_loss(student_BSV, teacher_BSV, labels_BS), plain)


LOSSES = {
    "next token": lambda student, teacher, labels: next_token_loss(student, labels),
    "whole vocabulary": distillation_loss,
    "top 8": lambda student, teacher, labels: top_k_distillation_loss(student, *TOP_8, labels),
}
TOP_8 = (torch.arange(8).expand(2, 128, 8), torch.full((2, 128, 8), 0.1).log())


@pytest.mark.parametrize("name", LOSSES)
def test_memory_is_the_gradient_and_eight_chunks(name, monkeypatch):
    # 2 x 128 positions of 32,768 tokens: 16 MiB in bf16, 32 MiB in fp32. Chunks of 1 MiB.
    monkeypatch.setattr(losses, "CHUNK_NUMBERS", MIB // 4)
    student_BSV = torch.randn(2, 128, 32_768, dtype=torch.bfloat16, requires_grad=True)
    teacher_BSV, labels_BS = torch.randn(2, 128, 32_768, dtype=torch.bfloat16), torch.zeros(2, 128, dtype=torch.long)
    gradients = []

    def step():
        gradients.append(gradient_of(LOSSES[name](student_BSV, teacher_BSV, labels_BS), student_BSV))

    assert 16 * MIB < peak_bytes(step) < (16 + 8) * MIB

    def whole():
        log_p, log_q = teacher_BSV.float().log_softmax(-1), student_BSV.float().log_softmax(-1)
        gradients.append(gradient_of(F.kl_div(log_q, log_p, log_target=True, reduction="sum"), student_BSV))

    assert peak_bytes(whole) > 100 * MIB


def test_another_vocabulary_is_refused():
    with pytest.raises(ValueError, match=r"\(1, 2, 5\) do not fit the student's \(1, 2, 4\).*unpruned model"):
        distillation_loss(torch.zeros(1, 2, 4), torch.zeros(1, 2, 5), torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"Targets \(1, 3, 2\) do not fit the student's logits \(1, 2, 4\)"):
        top_k_distillation_loss(torch.zeros(1, 2, 4), *[torch.zeros(1, 3, 2)] * 2, torch.zeros(1, 2).long())


def test_tokens_that_the_teacher_rules_out_count_nothing():
    student_BSV = torch.randn(1, 3, 6, generator=torch.Generator().manual_seed(3))
    teacher_BSV = torch.randn(1, 3, 6, generator=torch.Generator().manual_seed(4))
    teacher_BSV[..., 2] = -torch.inf
    labels_BS = torch.zeros(1, 3, dtype=torch.int64)
    allowed = [0, 1, 3, 4, 5]
    p_NV = teacher_BSV[0, :2, allowed].double().softmax(-1)
    q_NV = student_BSV[0, :2].double().log_softmax(-1)[:, allowed]
    expected = (p_NV * (p_NV.log() - q_NV)).sum(-1).mean()
    assert distillation_loss(student_BSV, teacher_BSV, labels_BS).item() == pytest.approx(expected.item(), rel=1e-5)
    tokens_BSk = torch.arange(6).expand(1, 3, 6)
    stored = top_k_distillation_loss(student_BSV, tokens_BSk, teacher_BSV.log_softmax(-1), labels_BS)
    assert stored.item() == pytest.approx(expected.item(), rel=1e-5)
