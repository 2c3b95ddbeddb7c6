"""The losses of distillation against plain loops."""

import math

import pytest
import torch

from hf_mcsmoe.losses import cross_entropy, kl_divergence, reference_kl_divergence, squared_error

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


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_divergence_is_the_teachers_times_the_squared_temperature(temperature: float) -> None:
    expected = temperature**2 * sum(_kl(*at, temperature) for at in COUNTED)
    found = kl_divergence(STUDENT, TEACHER, LABELS != -100, temperature)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_the_reference_form_masks_nothing_and_divides_by_the_batch() -> None:
    expected = sum(_kl(row, position, 2.0) for row in range(2) for position in range(3)) / 2
    assert float(reference_kl_divergence(STUDENT, TEACHER, 2.0)) == pytest.approx(expected, rel=1e-5)


def test_squared_error_is_the_mean_over_the_width_summed_over_the_positions() -> None:
    expected = sum(sum((a - b) ** 2 for a, b in zip(STUDENT[at], TEACHER[at], strict=True)) / 5 for at in COUNTED)
    assert float(squared_error(STUDENT, TEACHER, LABELS != -100)) == pytest.approx(float(expected), rel=1e-5)
