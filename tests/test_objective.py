from __future__ import annotations

import pytest
import torch
from kvconvert.uptrain import objective
from kvconvert.uptrain.objective import IGNORED_LABEL, cross_entropy_sum, forward_kl_sum
from torch.nn import functional as F

VOCAB = 11


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(2, 7, VOCAB, generator=generator) * 2 for _ in range(2))
    labels = torch.randint(0, VOCAB, (2, 7), generator=generator)
    labels[0, 3] = labels[1, 6] = IGNORED_LABEL
    return student, teacher, labels


def test_cross_entropy_equals_a_float64_loop() -> None:
    student, _, labels = batch()
    expected = 0.0
    for row in range(2):
        for place in range(1, 7):
            if labels[row, place] != IGNORED_LABEL:
                expected -= student[row, place - 1].double().log_softmax(-1)[labels[row, place]].item()
    assert cross_entropy_sum(student, labels).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("chunk", [1, 4, 1024])
def test_forward_kl_and_its_gradient_equal_autograd_in_float64(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective, "_CHUNK_TOKENS", chunk)
    student, teacher, labels = batch()
    reference = student.double().requires_grad_()
    keep = labels[:, 1:] != IGNORED_LABEL
    log_p, log_q = reference[:, :-1].log_softmax(-1), teacher[:, :-1].double().log_softmax(-1)
    expected = F.kl_div(log_p[keep], log_q[keep], reduction="sum", log_target=True)
    (3 * expected).backward()

    student.requires_grad_()
    total = forward_kl_sum(student, teacher, labels)
    (3 * total).backward()
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert student.grad is not None
    assert reference.grad is not None
    torch.testing.assert_close(student.grad.double(), reference.grad, rtol=1e-5, atol=1e-6)


def test_forward_kl_is_not_the_reverse() -> None:
    student, teacher, labels = batch()
    assert forward_kl_sum(student, teacher, labels).item() != pytest.approx(
        forward_kl_sum(teacher, student, labels).item(), rel=0.01
    )


def test_forward_kl_keeps_one_tensor_in_the_students_dtype() -> None:
    """The memory claim of its docstring: what autograd saves is the gradient, in bfloat16, and nothing else."""
    student, teacher, labels = batch()
    student = student.bfloat16().requires_grad_()
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        total = forward_kl_sum(student, teacher.bfloat16(), labels)
    large = [tensor for tensor in saved if tensor.is_floating_point()]
    assert [tensor.dtype for tensor in large] == [torch.bfloat16]
    assert total.dtype == torch.float32
