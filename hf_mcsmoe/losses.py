"""Losses of distillation, as sums over the positions that count; the caller divides."""

import torch
from torch.nn import functional as F


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the summed cross entropy, in float32, of `logits` [..., V] at `labels` int [...]; -100 does not count."""
    return F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), ignore_index=-100, reduction="sum")


def kl_divergence(
    student: torch.Tensor, teacher: torch.Tensor, counted: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Return the sum of `T^2 KL(teacher || student)` at temperature T over the positions that count, in float32.

    T^2 keeps the gradient's size whatever the temperature (Hinton et al. 2015, section 2).

    Args:
        student: logits [..., V].
        teacher: logits [..., V].
        counted: bool [...].
    """
    ours = (student[counted].float() / temperature).log_softmax(-1)
    theirs = (teacher[counted].float() / temperature).log_softmax(-1)
    return F.kl_div(ours, theirs, reduction="sum", log_target=True) * temperature**2


def reference_kl_divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the KL of the paper's released code: no T^2, padding not masked, divided by the batch size alone.

    Args:
        student: logits [batch, ..., V].
        teacher: logits [batch, ..., V].
    """
    ours = (student.float() / temperature).log_softmax(-1)
    theirs = (teacher.float() / temperature).log_softmax(-1)
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def squared_error(student: torch.Tensor, teacher: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Return the sum over the positions that count of the mean squared difference of two states [..., D]."""
    return (student[counted].float() - teacher[counted].float()).square().mean(-1).sum()
