"""Losses of distillation, as sums over the positions that count; the caller divides."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F

# Logits of a block of positions: what stays in a core's cache, or is enough work for an accelerator.
CPU_BLOCK, BLOCK = 2**17, 2**25


def aligned_labels(labels: torch.Tensor, shifted: bool) -> torch.Tensor:
    """Return labels int [B, T] as the logits stand: each position has the label that its logits are about, or -100.

    Args:
        shifted: whether the logits at a position are about the next one, as in a causal model.
    """
    return F.pad(labels[:, 1:], (0, 1), value=-100) if shifted else labels


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """Return the summed cross entropy, in float32, of `logits` [..., V] at `labels` int [...]; -100 does not count.

    Args:
        smoothing: share of the target's probability that goes to all of the vocabulary alike.
    """
    return F.cross_entropy(
        logits.float().flatten(0, -2), labels.flatten(), ignore_index=-100, reduction="sum", label_smoothing=smoothing
    )


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


def top_log_probs(
    teacher: torch.Tensor, temperature: float, top_k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what is kept of a distribution: k log-probabilities [n, k], their ids [n, k], and the rest's log [n].

    The rest is the mass of all other tokens, -inf where there are none.

    Args:
        teacher: logits [n, V].
    """
    logs = (teacher.float() / temperature).log_softmax(-1)
    top, ids = logs.topk(top_k, dim=-1)
    return top, ids, logs.scatter(-1, ids, -torch.inf).logsumexp(-1)


def top_kl_divergence(
    student: torch.Tensor, top: torch.Tensor, ids: torch.Tensor, rest: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Return the sum of `T^2 KL` over k tokens and one bucket for all others, in float32.

    Exact where k is the whole vocabulary. Else a lower bound of `kl_divergence`: joining outcomes loses what
    distinguishes them.

    Args:
        student: logits [n, V].
        top: the teacher's log-probabilities at temperature T [n, k]; `ids` their tokens [n, k].
        rest: log of the teacher's mass outside them [n].
    """
    logs = (student.float() / temperature).log_softmax(-1)
    total = F.kl_div(logs.gather(-1, ids), top.float(), reduction="sum", log_target=True)
    if ids.shape[-1] < logs.shape[-1]:
        ours = logs.scatter(-1, ids, -torch.inf).logsumexp(-1)
        # A rest too small for float32 adds nothing, but 0 times -inf would be NaN.
        total = total + F.kl_div(ours, rest.float().clamp(min=-100), reduction="sum", log_target=True)
    return total * temperature**2


def distillation_sums(
    student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `cross_entropy` and `kl_divergence` over the positions whose label is not -100, both in one go.

    Works through blocks of positions and makes nothing of the size of the logits but their gradient: over a large
    vocabulary the two functions spend more on moving memory than the teacher's forward takes.

    Args:
        student: logits [..., V].
        teacher: logits [..., V].
        labels: int [...].
    """
    return _DistillationSums.apply(student.flatten(0, -2), teacher.flatten(0, -2), labels.flatten(), temperature)


class _DistillationSums(torch.autograd.Function):
    """The sums over logits [N, V]; backward computes the distributions anew instead of keeping them."""

    @staticmethod
    def forward(
        ctx: Any, student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(student, teacher, labels)
        ctx.temperature = temperature
        task, kd = (torch.zeros((), device=student.device) for _ in range(2))
        for block in _blocks(labels, student):
            ours, theirs = student[block].float(), teacher[block].float()
            task += F.cross_entropy(ours, labels[block], reduction="sum")
            ours, theirs = (ours / temperature).log_softmax(-1), (theirs / temperature).log_softmax(-1)
            kd += (theirs.exp() * (theirs - ours)).sum()
        return task, kd * temperature**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_task: torch.Tensor, of_kd: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        student, teacher, labels = ctx.saved_tensors
        result = torch.zeros_like(student)
        for block in _blocks(labels, student):
            ours, theirs = student[block].float(), teacher[block].float()
            slope = (ours / ctx.temperature).softmax(-1).sub_((theirs / ctx.temperature).softmax(-1))
            slope.mul_(of_kd * ctx.temperature).addcmul_(ours.softmax(-1), of_task)
            slope.scatter_add_(-1, labels[block][:, None], -of_task.expand(len(slope), 1))
            result[block] = slope.to(result.dtype)
        return result, None, None, None


def _blocks(labels: torch.Tensor, logits: torch.Tensor) -> Iterator[slice | torch.Tensor]:
    """Yield the positions [N] whose label counts in blocks, as slices (which copy nothing) where all of them do."""
    rows = (labels != -100).nonzero().flatten()
    size = max((CPU_BLOCK if logits.device.type == "cpu" else BLOCK) // logits.shape[-1], 1)
    if len(rows) < len(labels):
        yield from rows.split(size)
        return
    yield from (slice(start, start + size) for start in range(0, len(labels), size))


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
