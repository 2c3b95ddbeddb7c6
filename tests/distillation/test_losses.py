"""The losses of distillation against plain loops."""

import math

import pytest
import torch
from torch.nn import functional

from hf_mcsmoe.distillation import losses
from hf_mcsmoe.distillation.losses import (
    cross_entropy,
    distillation_sums,
    kl_divergence,
    reference_kl_divergence,
    squared_error,
    top_kl_divergence,
    top_log_probs,
)

STUDENT, TEACHER = (torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
LABELS = torch.tensor([[1, -100, 4], [0, 2, -100]])
COUNTED = [(0, 0), (0, 2), (1, 0), (1, 1)]


def _softmax(logits: torch.Tensor, temperature: float) -> list[float]:
    powers = [math.exp(value / temperature) for value in logits.tolist()]
    return [power / sum(powers) for power in powers]


def _kl(row: int, position: int, temperature: float) -> float:
    theirs, ours = (_softmax(logits[row, position], temperature) for logits in (TEACHER, STUDENT))
    return sum(p * math.log(p / q) for p, q in zip(theirs, ours, strict=True))


def test_cross_entropy_is_summed_over_the_labels_that_count() -> None:
    expected = -sum(math.log(_softmax(STUDENT[at], 1)[LABELS[at]]) for at in COUNTED)
    assert float(cross_entropy(STUDENT, LABELS)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.1, 0.5])
def test_smoothing_gives_a_share_of_the_target_to_all_tokens_alike(smoothing: float) -> None:
    expected = 0.0
    for at in COUNTED:
        logs = [math.log(share) for share in _softmax(STUDENT[at], 1)]
        expected -= (1 - smoothing) * logs[LABELS[at]] + smoothing * sum(logs) / len(logs)
    assert float(cross_entropy(STUDENT, LABELS, smoothing)) == pytest.approx(expected, rel=1e-5)


def _joined(shares: list[float], kept: list[int]) -> list[float]:
    return [shares[token] for token in kept] + [sum(share for token, share in enumerate(shares) if token not in kept)]


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("top_k", [1, 2, 4, 5])
def test_kept_tokens_and_a_bucket_diverge_by_no_more_than_all_tokens(top_k: int, temperature: float) -> None:
    counted = LABELS != -100
    found = top_kl_divergence(STUDENT[counted], *top_log_probs(TEACHER[counted], temperature, top_k), temperature)
    expected = 0.0
    for at in COUNTED:
        theirs, ours = (_softmax(logits[at], temperature) for logits in (TEACHER, STUDENT))
        kept = sorted(range(5), key=lambda token, theirs=theirs: -theirs[token])[:top_k]
        pairs = zip(_joined(theirs, kept), _joined(ours, kept), strict=True)
        expected += sum(p * math.log(p / q) for p, q in pairs if p > 0)
    assert float(found) == pytest.approx(temperature**2 * expected, rel=1e-4)
    whole = float(kl_divergence(STUDENT, TEACHER, counted, temperature))
    assert float(found) == pytest.approx(whole, rel=1e-4) if top_k == 5 else float(found) < whole


@pytest.mark.parametrize("top_k", [2, 5])
def test_a_rest_of_nothing_gives_a_finite_gradient(top_k: int) -> None:
    student = STUDENT[0].clone().requires_grad_()
    certain = torch.tensor([400.0, 399.0, 0.0, 0.0, 0.0]).repeat(3, 1)
    top_kl_divergence(student, *top_log_probs(certain, 1.0, top_k), 1.0).backward()
    expected = STUDENT[0].clone().requires_grad_()
    kl_divergence(expected, certain, torch.ones(3, dtype=torch.bool), 1.0).backward()
    torch.testing.assert_close(student.grad, expected.grad)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_divergence_is_the_teachers_times_the_squared_temperature(temperature: float) -> None:
    expected = temperature**2 * sum(_kl(*at, temperature) for at in COUNTED)
    found = kl_divergence(STUDENT, TEACHER, LABELS != -100, temperature)
    assert float(found) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("rows", [1, 2, None], ids=["one row", "two rows", "all rows"])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_in_blocks_are_those_of_the_whole(rows: int | None, masked: bool, dtype: torch.dtype) -> None:
    """Tokens that are never said change nothing, but so many that a block holds a row or two."""
    labels = LABELS if masked else LABELS.clamp(min=0)
    unsaid = losses.CPU_BLOCK // rows - STUDENT.shape[-1] if rows else 0
    found, teacher = (functional.pad(logits.to(dtype), (0, unsaid), value=-1e4) for logits in (STUDENT, TEACHER))
    task, kd = distillation_sums(found.requires_grad_(), teacher, labels, 2.0)
    (0.7 * task + 0.2 * kd).backward()
    expected = STUDENT.to(dtype, copy=True).requires_grad_()
    wanted = cross_entropy(expected, labels), kl_divergence(expected, TEACHER.to(dtype), labels != -100, 2.0)
    (0.7 * wanted[0] + 0.2 * wanted[1]).backward()
    torch.testing.assert_close((task, kd), wanted)
    # Of the two gradients that are added, autograd rounds each to bfloat16; here only their sum is rounded.
    exact = {} if dtype == torch.float32 else {"atol": 8e-3, "rtol": 2e-2}
    torch.testing.assert_close(found.grad[..., : STUDENT.shape[-1]], expected.grad, **exact)
    assert not found.grad[..., STUDENT.shape[-1] :].any()


def test_sums_have_the_gradient_of_what_they_sum() -> None:
    """By hand: softmax less the label, and T times the difference of both distributions at T."""
    student = STUDENT.clone().requires_grad_()
    task, kd = distillation_sums(student, TEACHER, LABELS, 2.0)
    gradient = torch.autograd.grad(task + kd, student)[0]
    assert not gradient[0, 1].any()
    assert not gradient[1, 2].any()
    for at in COUNTED:
        ours, theirs = (torch.tensor(_softmax(logits[at], 2.0)) for logits in (STUDENT, TEACHER))
        expected = torch.tensor(_softmax(STUDENT[at], 1.0)) + 2.0 * (ours - theirs)
        expected[LABELS[at]] -= 1
        torch.testing.assert_close(gradient[at], expected)


def test_the_reference_form_masks_nothing_and_divides_by_the_batch() -> None:
    expected = sum(_kl(row, position, 2.0) for row in range(2) for position in range(3)) / 2
    assert float(reference_kl_divergence(STUDENT, TEACHER, 2.0)) == pytest.approx(expected, rel=1e-5)


def test_squared_error_is_the_mean_over_the_width_summed_over_the_positions() -> None:
    expected = sum(sum((a - b) ** 2 for a, b in zip(STUDENT[at], TEACHER[at], strict=True)) / 5 for at in COUNTED)
    assert float(squared_error(STUDENT, TEACHER, LABELS != -100)) == pytest.approx(float(expected), rel=1e-5)
