"""The effect on a model of other experts in one layer, measured on a few rows without changing the model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_mcsmoe.calibration.inputs import LayerInputs
from hf_mcsmoe.evaluation.held_out import Judge
from hf_mcsmoe.layers.batches import Batch, hooks, mask_of, token_masks
from hf_mcsmoe.layers.layer import MoELayer
from hf_mcsmoe.methods.view import Routed
from hf_mcsmoe.repair.fit import LayerFit, merged_output, original_sum

# Bytes for the original's distributions on the rows.
MEMORY_LIMIT = 500_000_000


@dataclass
class Student:
    """Experts in the place of those of a layer: the container, the plan's map, and what the original ones give."""

    fit: LayerFit

    def difference(self, routed: Routed) -> torch.Tensor:
        """Return what the layer's output becomes more, float32 [n, D], a row per input of an expert."""
        rows = routed.per_input()
        weights = rows.weights.masked_fill(~rows.reached, 0)
        nobody = torch.zeros(len(rows.hidden), dtype=torch.bool)
        given = LayerInputs(rows.hidden.cpu(), rows.index.cpu(), weights.cpu(), nobody)
        here = LayerFit(self.fit.name, self.fit.experts, self.fit.originals, self.seen(given), given, None)
        everything = torch.arange(len(given))
        return merged_output(here, here.experts, everything).cpu() - original_sum(here, normed=True)

    def seen(self, inputs: LayerInputs) -> LayerInputs:
        """Return what the student's experts see where the original ones see `inputs`."""
        return inputs.mapped(self.fit.expert_map or ())


class Probe:
    """A few rows, and what the original model says of them."""

    def __init__(self, model: PreTrainedModel, batches: Sequence[Batch]) -> None:
        """Run the original on the rows."""
        self.model, self.judge = model, Judge(list(batches), memory_limit=MEMORY_LIMIT)
        self.judge.remember(model)
        self.masks = [token_masks(model, batch) for batch in batches]

    @property
    def tells(self) -> bool:
        """Whether the model gives distributions that can be compared."""
        return bool(self.judge.kept)

    def measure(self, layers: Sequence[MoELayer], student: Student) -> tuple[float, float]:
        """Return the squared error of the layers' output per token with other experts, and the divergence in nats.

        Args:
            layers: those that share the experts.
        """
        errors: list[torch.Tensor] = []
        with torch.no_grad(), hooks() as handles:
            for layer in layers:
                handles.extend(self._changed(layer, student, errors))
            self.judge.measure("changed", self.model)
        divergence = self.judge.quality.pop("changed").kl
        return float(torch.cat(errors).mean()), max(divergence or 0.0, 0.0)

    def _changed(self, layer: MoELayer, student: Student, errors: list[torch.Tensor]) -> Iterator[Any]:
        """Yield the hooks that let a layer give what the student's experts would."""
        masks, waiting = iter(self.masks), list[torch.Tensor]()

        def take(routed: Routed) -> None:
            missed = student.difference(routed)
            per_token = len(missed) // len(routed.logits)
            counted = mask_of(layer, next(masks), len(routed.logits))
            squared = missed.square().sum(1)
            errors.append(squared if counted is None else squared[counted.cpu().repeat_interleave(per_token)])
            waiting.append(missed.unflatten(0, (-1, per_token)).sum(1))

        def add(module: nn.Module, arguments: tuple, output: Any) -> Any:
            first = output[0] if isinstance(output, tuple) else output
            changed = first + waiting.pop().to(first).view_as(first)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        yield from layer.routed(take)
        yield layer.model.get_submodule(layer.output_name).register_forward_hook(add)
