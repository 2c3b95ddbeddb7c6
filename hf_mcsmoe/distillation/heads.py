"""Losses of models whose labels are of whole texts: one class, several, numbers, or the ends of an answer."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from hf_mcsmoe.distillation.losses import cross_entropy, kl_divergence
from hf_mcsmoe.layers.batches import Batch
from hf_mcsmoe.layers.labels import labelled

SPANS = {"start_positions": "start_logits", "end_positions": "end_logits"}
# What a batch has to bring, by what the labels are of.
NEEDED = {"text": ("labels",), "tokens": ("labels",), "texts": ("labels",), "spans": tuple(SPANS)}


@dataclass(frozen=True)
class Head:
    """One of a model's outputs with its labels: logits `outputs[name]` and what they are compared with.

    `kind` is "single" (labels int [B], -100 does not count), "several" (shares in [0, 1], of the logits' shape) or
    "number" (of the logits' shape).
    """

    name: str
    labels: torch.Tensor
    kind: str

    def count(self) -> torch.Tensor:
        """Return how many labels count."""
        return (self.labels != -100).sum() if self.kind == "single" else torch.tensor(self.labels.numel())

    def task_sum(self, outputs: Any, smoothing: float) -> torch.Tensor:
        """Return the sum of the model's own loss over the labels that count, in float32."""
        logits, labels = self._pair(outputs)
        if self.kind == "single":
            return cross_entropy(logits, labels, smoothing)
        if self.kind == "several":
            return F.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
        return F.mse_loss(logits, labels, reduction="sum")

    def kd_sum(self, outputs: Any, theirs: Any, temperature: float) -> torch.Tensor:
        """Return the sum of the divergence from the teacher: `T^2 KL` of one class or of each; of numbers, squares."""
        logits, labels = self._pair(outputs)
        wanted = theirs[self.name].to(logits.device).float().view(logits.shape)
        if self.kind == "single":
            return kl_divergence(logits, wanted, labels != -100, temperature)
        if self.kind == "several":
            return bernoulli_kl(logits, wanted, temperature)
        return F.mse_loss(logits, wanted, reduction="sum")

    def _pair(self, outputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        logits = outputs[self.name].float()
        labels = self.labels.to(logits.device)
        return (logits, labels) if self.kind == "single" else (logits.view(labels.shape), labels.float())


def bernoulli_kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the sum of `T^2 KL(teacher || student)` of each logit's own yes or no at temperature T, in float32."""
    ours, theirs = student.float() / temperature, teacher.float() / temperature
    yes = theirs.sigmoid() * (F.logsigmoid(theirs) - F.logsigmoid(ours))
    no = (-theirs).sigmoid() * (F.logsigmoid(-theirs) - F.logsigmoid(-ours))
    return (yes + no).sum() * temperature**2


def check_heads(model: PreTrainedModel, options: Any) -> None:
    """Check that a model's labels are known, and that the options are losses that they have.

    Raises:
        ValueError: they are not.
    """
    kind = labelled(model)
    if kind not in NEEDED:
        raise ValueError(
            f"What the labels of a {type(model).__name__} are of is not known, so nothing can distil it: pass a model "
            "that writes text or classifies."
        )
    if kind == "tokens" and options.teacher_outputs is not None:
        raise ValueError(f"teacher_outputs are of models that write text, not of a {type(model).__name__}.")
    if kind in ("texts", "spans"):
        for name in ("hidden_weight", "reference_kd", "teacher_outputs"):
            if vars(options)[name]:
                raise ValueError(
                    f"{name}={vars(options)[name]} needs a label for each token, and those of a "
                    f"{type(model).__name__} are of whole texts: leave it out."
                )


def heads_of(model: PreTrainedModel, batch: Batch) -> list[Head]:
    """Return what the labels of a batch are compared with, as a model of Transformers does in its own loss.

    Raises:
        ValueError: labels of a shape that the model has no outputs for.
    """
    if labelled(model) == "spans":
        length = batch["input_ids"].shape[-1] if "input_ids" in batch else batch["inputs_embeds"].shape[-2]
        places = (batch[name].reshape(-1).clamp(0, length) for name in SPANS)
        cut_off = (place.masked_fill(place == length, -100) for place in places)
        return [Head(name, place, "single") for name, place in zip(SPANS.values(), cut_off, strict=True)]
    labels, number = batch["labels"], len(cast(dict, model.config.id2label))
    kind = KINDS[problem_type(model, labels)]
    rows = next(len(batch[name]) for name in ("input_ids", "inputs_embeds") if name in batch)
    wanted = rows if kind == "single" or number == 1 else rows * number
    if labels.numel() != wanted:
        raise ValueError(
            f"{rows} texts have labels of shape {list(labels.shape)}, the model {number} outputs and the problem_type "
            f"{problem_type(model, labels)!r}: pass {wanted} labels, or set problem_type in the model's configuration."
        )
    return [Head("logits", labels.reshape(-1) if kind == "single" else labels, kind)]


KINDS = {"single_label_classification": "single", "multi_label_classification": "several", "regression": "number"}


def problem_type(model: PreTrainedModel, labels: torch.Tensor) -> str:
    """Return the problem type of a classifier of texts: that of its configuration, or what the labels tell."""
    if model.config.problem_type is not None:
        return model.config.problem_type
    if len(cast(dict, model.config.id2label)) == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
