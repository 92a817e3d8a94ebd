from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kvconvert.convert.errors import UnsupportedError
from kvconvert.uptrain.losses import prediction
from kvconvert.uptrain.losses.prediction import IGNORED_LABEL, prediction_loss_sum
from kvconvert.uptrain.recipe import LossWeights
from torch.nn import functional as F

VOCAB = 11
CROSS_ENTROPY = LossWeights(kl=0.0, cross_entropy=1.0)
MIXED = LossWeights(kl=0.7, cross_entropy=0.4, temperature=2.5)


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(2, 7, VOCAB, generator=generator) * 2 for _ in range(2))
    labels = torch.randint(0, VOCAB, (2, 7), generator=generator)
    labels[0, 3] = labels[1, 6] = IGNORED_LABEL
    return student, teacher, labels


def reference(student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, weights: LossWeights) -> torch.Tensor:
    """Token by token in float64: T² Σ q (log q − log p) and −log p(label)."""
    total = torch.zeros((), dtype=torch.float64)
    for row in range(2):
        for place in range(1, 7):
            if labels[row, place] == IGNORED_LABEL:
                continue
            logits = student[row, place - 1]
            log_p = (logits / weights.temperature).log_softmax(-1)
            log_q = (teacher[row, place - 1].double() / weights.temperature).log_softmax(-1)
            total = total + weights.kl * weights.temperature**2 * (log_q.exp() * (log_q - log_p)).sum()
            total = total - weights.cross_entropy * logits.log_softmax(-1)[labels[row, place]]
    return total


@pytest.mark.parametrize("chunk", [1, 4, 1024])
@pytest.mark.parametrize("weights", [LossWeights(), CROSS_ENTROPY, MIXED], ids=["kl", "cross-entropy", "both"])
def test_loss_and_gradient_equal_a_float64_loop(
    weights: LossWeights, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prediction, "_CHUNK_TOKENS", chunk)
    student, teacher, labels = batch()
    exact = student.double().requires_grad_()
    expected = reference(exact, teacher, labels, weights)
    (3 * expected).backward()

    leaf = student.clone().requires_grad_()
    total = prediction_loss_sum(leaf * 1, labels, weights, teacher_logits=teacher)
    (3 * total).backward()
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert leaf.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("student_padding", "teacher_padding"), [(0, 4), (4, 0)])
def test_rows_of_padding_are_nothing_that_a_teacher_expects(student_padding: int, teacher_padding: int) -> None:
    student, teacher, labels = batch()
    student = F.pad(student, (0, student_padding), value=1.5)
    exact = student.double().requires_grad_()
    expected = reference(exact, F.pad(teacher, (0, student_padding), value=-1e9), labels, MIXED)
    expected.backward()
    leaf = student.clone().requires_grad_()
    padded = F.pad(teacher, (0, teacher_padding), value=1.5)
    total = prediction_loss_sum(leaf * 1, labels, MIXED, teacher_logits=padded)
    total.backward()
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert leaf.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)
    without = reference(student[..., :VOCAB].double(), teacher, labels, MIXED).item()
    assert (total.item() == pytest.approx(without, rel=1e-6)) == (student_padding == 0)


def test_the_divergence_is_forward() -> None:
    student, teacher, labels = batch()
    swapped = prediction_loss_sum(teacher.clone(), labels, LossWeights(), teacher_logits=student).item()
    assert prediction_loss_sum(student, labels, LossWeights(), teacher_logits=teacher).item() != pytest.approx(
        swapped, rel=0.01
    )


def test_the_gradient_is_written_over_the_logits() -> None:
    """The memory claim of its docstring: nothing of the logits' size is held beside them."""
    student, teacher, labels = batch()
    logits = student.bfloat16().requires_grad_() * 1
    saved: list[torch.Tensor] = []
    gradients: list[torch.Tensor] = []
    logits.register_hook(gradients.append)

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        total = prediction_loss_sum(logits, labels, MIXED, teacher_logits=teacher.bfloat16())
    total.backward()
    assert saved == []
    assert total.dtype == torch.float32
    assert [gradient.data_ptr() for gradient in gradients] == [logits.data_ptr()]


def test_without_a_gradient_the_logits_stay() -> None:
    student, teacher, labels = batch()
    before = student.clone()
    prediction_loss_sum(student, labels, MIXED, teacher_logits=teacher)
    assert torch.equal(student, before)


def test_logits_that_their_maker_needs_are_not_overwritten_silently() -> None:
    """tanh keeps its output for its backward: autograd sees the write and refuses."""
    student, teacher, labels = batch()
    logits = torch.tanh(student.requires_grad_())
    total = prediction_loss_sum(logits, labels, LossWeights(), teacher_logits=teacher)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_a_second_backward_fails() -> None:
    student, teacher, labels = batch()
    total = prediction_loss_sum(student.requires_grad_() * 1, labels, LossWeights(), teacher_logits=teacher)
    total.backward(retain_graph=True)
    with pytest.raises(AttributeError):
        total.backward()


@given(st.floats(0.1, 10), st.integers(0, 1000))
def test_a_student_that_is_its_teacher_has_no_divergence(temperature: float, seed: int) -> None:
    student, _, labels = batch(seed)
    leaf = student.clone().requires_grad_()
    weights = LossWeights(temperature=temperature)
    total = prediction_loss_sum(leaf * 1, labels, weights, teacher_logits=student)
    total.backward()
    assert total.item() == pytest.approx(0, abs=1e-5 * temperature**2)
    assert leaf.grad is not None
    assert leaf.grad.abs().max().item() < 1e-6 * max(temperature, 1)


@given(st.integers(0, 1000))
def test_cross_entropy_is_that_of_torch(seed: int) -> None:
    student, _, labels = batch(seed)
    expected = F.cross_entropy(student[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    assert prediction_loss_sum(student, labels, CROSS_ENTROPY).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"kl": -1.0}, "kl weight is -1.0, expected 0 or more"),
        ({"cross_entropy": math.nan}, "cross_entropy weight is nan, expected 0 or more"),
        ({"kl": 0.0}, "the weights of KL and cross-entropy are both 0"),
        ({"temperature": 0.0}, "temperature is 0.0, expected a positive number"),
    ],
)
def test_unusable_weights(weights: dict[str, float], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        LossWeights(**weights)
