"""The terms of a distillation's loss, from one forward of the student and what there is of the teacher."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_mcsmoe.distillation.expert_outputs import ExpertOutputs, Outputs, observed_outputs
from hf_mcsmoe.distillation.losses import (
    aligned_labels,
    cross_entropy,
    distillation_sums,
    kl_divergence,
    reference_kl_divergence,
    squared_error,
    top_kl_divergence,
)
from hf_mcsmoe.distillation.teacher_outputs import STORED
from hf_mcsmoe.layers.batches import Batch, without_cache

# Per term of the loss the argument that weighs it.
TERMS = {"task_loss": None, "kd_loss": "kd_weight", "hidden_loss": "hidden_weight", "expert_loss": "expert_weight"}
HIDDEN_STATES = ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")
Terms = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Divisors:
    """What the sums over a batch are divided by, so that the terms of an accumulated batch add up to its mean.

    `labels` that count; `tokens` on each side, see `ExpertOutputs`; `batches` that the accumulated one is cut into.
    """

    labels: torch.Tensor
    tokens: dict[str, torch.Tensor]
    batches: int


class DistillationLoss:
    """`cross entropy + kd_weight * T^2 * KL(teacher || student) + hidden_weight * ... + expert_weight * ...`."""

    def __init__(self, options: Any, student: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
        """Take the arguments of the trainer, and the teacher; None where its outputs come with the batches."""
        self.options, self.teacher = options, teacher
        self.shifted = not student.config.is_encoder_decoder
        self.experts = ExpertOutputs(student, teacher) if teacher is not None and options.expert_weight else None

    def __call__(self, model: nn.Module, student: nn.Module, batch: Batch, divisors: Divisors) -> tuple[Terms, Any]:
        """Return the terms and the student's outputs.

        Args:
            model: what is called; `student` is the model inside it, whatever it is wrapped in.
            batch: inputs of the model with labels, and what is stored of the teacher.

        Raises:
            ValueError: an expert loss without a gradient.
        """
        inputs = self._inputs(student, batch)
        outputs, layers = self._run(model, student, inputs)
        theirs: Any = None
        if self.teacher is not None:
            with torch.no_grad():
                theirs, their_layers = self._run(self.teacher, self.teacher, inputs)
        labels = aligned_labels(batch["labels"].to(outputs.logits.device), self.shifted)
        counted, share = labels != -100, 1 / divisors.labels.to(labels.device).clamp(min=1)
        terms = {name: value * share for name, value in self._sums(outputs.logits, theirs, labels, batch).items()}
        if theirs is not None and self.options.reference_kd:
            terms["kd_loss"] = self._reference(outputs, theirs) / divisors.batches
        if theirs is not None and self.options.hidden_weight:
            ours, wanted = _last_hidden(outputs), _last_hidden(theirs)
            terms["hidden_loss"] = squared_error(ours, wanted.to(ours.device), counted.to(ours.device)) * share
        if self.experts is not None:
            self._check_gradient(outputs, layers)
            terms["expert_loss"] = self.experts.error(batch, layers, their_layers, divisors.tokens).to(labels.device)
        return terms, self._without_hidden_states(outputs)

    def total(self, terms: Terms) -> torch.Tensor:
        """Return the weighted sum of the terms."""
        weights = {name: 1.0 if weight is None else vars(self.options)[weight] for name, weight in TERMS.items()}
        return torch.stack([weights[name] * value for name, value in terms.items()]).sum()

    def _sums(self, logits: torch.Tensor, theirs: Any, labels: torch.Tensor, batch: Batch) -> Terms:
        """Return the sums over the labels [B, T] that count: of the task, and of the divergence that needs a mask."""
        counted, temperature = labels != -100, self.options.kd_temperature
        smoothing, live = self.options.label_smoothing_factor, theirs is not None and not self.options.reference_kd
        if live and not smoothing:
            wanted = theirs.logits.to(logits.device)
            return dict(zip(TERMS, distillation_sums(logits, wanted, labels, temperature), strict=False))
        sums = {"task_loss": cross_entropy(logits[counted], labels[counted], smoothing)}
        if live:
            sums["kd_loss"] = kl_divergence(logits, theirs.logits.to(logits.device), counted, temperature)
        elif theirs is None and STORED[0] in batch:
            top, ids, rest = (batch[name].to(logits.device) for name in STORED)
            sums["kd_loss"] = top_kl_divergence(logits[counted], top, ids, rest, temperature)
        return sums

    def _inputs(self, student: nn.Module, batch: Batch) -> dict[str, Any]:
        """Return what both models are given: with labels each would compute a loss of its own over its logits."""
        inputs = {name: value for name, value in batch.items() if name not in (*STORED, "labels")}
        if not self.shifted and not inputs.keys() & {"decoder_input_ids", "decoder_inputs_embeds"}:
            make = cast(Any, student).prepare_decoder_input_ids_from_labels
            inputs["decoder_input_ids"] = make(batch["labels"])
        return inputs

    def _run(self, model: nn.Module, inside: nn.Module, inputs: Batch) -> tuple[Any, Outputs]:
        """Return the outputs of a model and of its layers of experts, as far as they are needed."""
        more = without_cache(inside) | ({"output_hidden_states": True} if self.options.hidden_weight else {})
        if self.experts is None:
            return model(**{**inputs, **more}), {}
        with observed_outputs(inside, self.experts.layers) as layers:
            return model(**{**inputs, **more}), layers

    def _reference(self, ours: Any, theirs: Any) -> torch.Tensor:
        student, teacher = ours.logits, theirs.logits.to(ours.logits.device)
        if self.shifted:
            student, teacher = student[:, :-1], teacher[:, :-1]
        return reference_kl_divergence(student, teacher, self.options.kd_temperature)

    def _check_gradient(self, outputs: Any, layers: Outputs) -> None:
        if outputs.logits.requires_grad and not any(states.requires_grad for states in layers.values()):
            raise ValueError(
                "expert_weight trains nothing: no part before or in the layers of experts is trained, or gradient "
                "checkpointing is of the reentrant kind; set its use_reentrant to False."
            )

    def _without_hidden_states(self, outputs: Any) -> Any:
        """Drop the hidden states that were asked for here, or an evaluation would gather those of all rows."""
        if not self.options.hidden_weight:
            return outputs
        return type(outputs)(**{name: value for name, value in outputs.items() if name not in HIDDEN_STATES})


def _last_hidden(outputs: Any) -> torch.Tensor:
    states = outputs.get("decoder_hidden_states")
    return (states if states is not None else outputs["hidden_states"])[-1]
