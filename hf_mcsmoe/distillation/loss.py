"""The terms of a distillation's loss, from one forward of the student and what there is of the teacher."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_mcsmoe.distillation.expert_outputs import ExpertOutputs, Outputs, observed_outputs
from hf_mcsmoe.distillation.heads import NEEDED, check_heads, heads_of
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
from hf_mcsmoe.layers.labels import labelled

# Per term of the loss the argument that weighs it.
TERMS = {"task_loss": None, "kd_loss": "kd_weight", "hidden_loss": "hidden_weight", "expert_loss": "expert_weight"}
HIDDEN_STATES = ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")
# Models with a label for each token, see `labelled`.
OF_TOKENS = ("text", "tokens")
Terms = dict[str, torch.Tensor]
TaskLoss = Callable[[Any, torch.Tensor | None], torch.Tensor]


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
        check_heads(student, options)
        self.options, self.teacher = options, teacher
        self.encoder_decoder, self.labelled = student.config.is_encoder_decoder, labelled(student)
        self.shifted = self.labelled == "text" and not self.encoder_decoder
        self.experts = ExpertOutputs(student, teacher) if teacher is not None and options.expert_weight else None

    def needed(self) -> tuple[str, ...]:
        """Return the names of the labels in a batch."""
        return NEEDED[self.labelled]

    def count(self, student: PreTrainedModel, batch: Batch) -> torch.Tensor:
        """Return how many labels of a batch count."""
        if self.labelled in OF_TOKENS:
            return (aligned_labels(batch["labels"], self.shifted) != -100).sum()
        return torch.stack([head.count() for head in heads_of(student, batch)]).sum()

    def __call__(
        self,
        model: nn.Module,
        student: PreTrainedModel,
        batch: Batch,
        divisors: Divisors,
        task: TaskLoss | None = None,
    ) -> tuple[Terms, Any]:
        """Return the terms and the student's outputs.

        Args:
            model: what is called; `student` is the model inside it, whatever it is wrapped in.
            batch: inputs of the model with labels, and what is stored of the teacher.
            task: a loss of the outputs and the labels, a mean already, in place of the model's own.

        Raises:
            ValueError: an expert loss without a gradient.
        """
        inputs = self._inputs(student, batch)
        outputs, layers = self._run(model, student, inputs)
        theirs: Any = None
        if self.teacher is not None:
            with torch.no_grad():
                theirs, their_layers = self._run(self.teacher, self.teacher, inputs)
        sums = self._sums_of_tokens if self.labelled in OF_TOKENS else self._sums_of_heads
        values = sums(student, outputs, theirs, batch, own=task is None)
        terms = {name: value / divisors.labels.to(value.device).clamp(min=1) for name, value in values.items()}
        if task is not None:
            terms = {"task_loss": task(outputs, batch.get("labels")), **terms}
        if theirs is not None and self.options.reference_kd:
            terms["kd_loss"] = self._reference(outputs, theirs) / divisors.batches
        if self.experts is not None:
            self._check_gradient(terms, layers)
            error = self.experts.error(batch, layers, their_layers, divisors.tokens)
            terms["expert_loss"] = error.to(terms["task_loss"].device)
        return terms, self._without_hidden_states(outputs)

    def total(self, terms: Terms) -> torch.Tensor:
        """Return the weighted sum of the terms."""
        weights = {name: 1.0 if weight is None else vars(self.options)[weight] for name, weight in TERMS.items()}
        return torch.stack([weights[name] * value for name, value in terms.items()]).sum()

    def _sums_of_heads(self, student: PreTrainedModel, outputs: Any, theirs: Any, batch: Batch, own: bool) -> Terms:
        """Return the sums over the labels of whole texts: of the task where it is the model's own, of the teacher."""
        heads, sums = heads_of(student, batch), {}
        if self.options.label_smoothing_factor and any(head.kind != "single" for head in heads):
            raise ValueError(
                f"label_smoothing_factor={self.options.label_smoothing_factor} is for labels of one class of several, "
                "which these are not: set it to 0."
            )
        if own:
            tasks = [head.task_sum(outputs, self.options.label_smoothing_factor) for head in heads]
            sums["task_loss"] = torch.stack(tasks).sum()
        if theirs is not None:
            divergences = [head.kd_sum(outputs, theirs, self.options.kd_temperature) for head in heads]
            sums["kd_loss"] = torch.stack(divergences).sum()
        return sums

    def _sums_of_tokens(self, student: PreTrainedModel, outputs: Any, theirs: Any, batch: Batch, own: bool) -> Terms:
        """Return the sums over the tokens whose labels count: of the task where it is the model's own, and others."""
        logits = outputs.logits
        wanted = cast(Any, None if theirs is None else theirs.logits.to(logits.device))
        labels = aligned_labels(batch["labels"].to(logits.device), self.shifted)
        counted, temperature, sums = labels != -100, self.options.kd_temperature, {}
        smoothing, live = self.options.label_smoothing_factor, wanted is not None and not self.options.reference_kd
        if live and own and not smoothing:
            sums = dict(zip(TERMS, distillation_sums(logits, wanted, labels, temperature), strict=False))
        elif own:
            sums["task_loss"] = cross_entropy(logits[counted], labels[counted], smoothing)
        if live and "kd_loss" not in sums:
            sums["kd_loss"] = kl_divergence(logits, wanted, counted, temperature)
        if theirs is None and STORED[0] in batch:
            top, ids, rest = (batch[name].to(logits.device) for name in STORED)
            sums["kd_loss"] = top_kl_divergence(logits[counted], top, ids, rest, temperature)
        if theirs is not None and self.options.hidden_weight:
            ours, states = _last_hidden(outputs), _last_hidden(theirs)
            sums["hidden_loss"] = squared_error(ours, states.to(ours.device), counted.to(ours.device))
        return sums

    def _inputs(self, student: nn.Module, batch: Batch) -> dict[str, Any]:
        """Return what both models are given: with labels each would compute a loss of its own over its logits."""
        inputs = {name: value for name, value in batch.items() if name not in (*STORED, *self.needed())}
        is_answer = self.encoder_decoder and self.labelled == "text"
        if is_answer and not inputs.keys() & {"decoder_input_ids", "decoder_inputs_embeds"}:
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

    def _check_gradient(self, terms: Terms, layers: Outputs) -> None:
        if terms["task_loss"].requires_grad and not any(states.requires_grad for states in layers.values()):
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
