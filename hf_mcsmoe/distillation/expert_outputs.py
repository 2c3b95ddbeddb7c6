"""The expert-output loss: how far each layer of experts of a student is from the same layer of its teacher."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_mcsmoe.distillation.losses import squared_error
from hf_mcsmoe.layers.batches import Batch, forward, hooks, mask_of, side_of, token_masks
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.layer import MoELayer

Outputs = dict[str, torch.Tensor]
# Rows of the training set on which the scale of the teacher's outputs is measured.
SCALE_ROWS = 64


@contextlib.contextmanager
def observed_outputs(model: nn.Module, layers: Sequence[MoELayer]) -> Iterator[Outputs]:
    """Yield a dictionary that fills with the outputs [T, D] of `layers` in a forward of `model` within the block.

    The hooks are gone after the block, so that what gradient checkpointing computes again is not taken twice.
    """
    outputs: Outputs = {}
    with hooks() as handles:
        for layer in layers:
            module = model.get_submodule(layer.output_name)
            handles.append(module.register_forward_hook(_keeper(outputs, layer.name)))
        yield outputs


def _keeper(outputs: Outputs, name: str) -> Any:
    def keep(module: nn.Module, arguments: tuple, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        # A copy, because some families add the shared expert's output to it in place.
        outputs[name] = states.reshape(-1, states.shape[-1]).clone()

    return keep


class ExpertOutputs:
    """Compares the outputs of a student's layers of experts with its teacher's.

    The error of a layer is `sum |o - o'|^2 / (tokens * s)`, where s is the mean of `|o'|^2` over the tokens of a fixed
    part of the data: relative to the teacher's second moment, so that layers of any scale count alike, and linear in
    the tokens, so that it does not matter how a batch is cut. Tokens count by the attention mask on the encoder's side
    and by the labels on the decoder's, see `token_masks`.
    """

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        """Find the layers.

        Raises:
            ValueError: the teacher's layers are not where the student's are.
        """
        self.teacher, self.layers = teacher, Layers.of(teacher)
        self.scales: dict[str, float] = {}
        paths, sizes = dict(student.named_modules()), [layer.hidden_size for layer in Layers.of(student)]
        lacking = [layer.name for layer in self.layers if layer.output_name not in paths]
        if lacking or sizes != [layer.hidden_size for layer in self.layers]:
            what = lacking[0] if lacking else f"{len(self.layers)} layers of other sizes or numbers"
            raise ValueError(
                f"The student has no counterpart of the teacher's layers of experts ({what}), so expert_weight has "
                "nothing to compare: take the student's original model as teacher, or set expert_weight to 0."
            )

    def measure(self, batches: Iterable[Batch]) -> None:
        """Set the scale of each layer: the mean square of an entry of the teacher's output at the counted tokens."""
        sums, counts = dict.fromkeys(self._names, 0.0), dict.fromkeys(self._names, 0)
        for batch in batches:
            with torch.no_grad(), observed_outputs(self.teacher, self.layers) as outputs:
                forward(self.teacher, batch)
            for layer, states, counted in self._counted(batch, outputs):
                sums[layer.name] += states[counted].float().square().mean(-1).sum().item()
                counts[layer.name] += int(counted.sum())
        self.scales = {name: sums[name] / max(counts[name], 1) or 1.0 for name in self._names}

    def error(self, batch: Batch, ours: Outputs, theirs: Outputs, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the mean over the layers of their relative errors.

        Args:
            tokens: the tokens to divide by on each side, as `count_tokens` counts them in a batch or in several.
        """
        errors = []
        for layer, states, counted in self._counted(batch, ours):
            wanted = theirs[layer.name].to(states.device)
            error = squared_error(states, wanted, counted) / self.scales[layer.name]
            errors.append((error / tokens[side_of(layer)].to(states.device).clamp(min=1)).to(self.teacher.device))
        return torch.stack(errors).mean()

    def count_tokens(self, batches: Sequence[Batch]) -> dict[str, torch.Tensor]:
        """Return how many tokens of some batches count, int [], on the side of the "encoder" and of the "decoder"."""
        totals = {side: torch.zeros((), dtype=torch.long) for side in ("encoder", "decoder")}
        for batch in batches:
            masks = token_masks(self.teacher, batch)
            for side, total in totals.items():
                given = masks[side].sum() if side in masks else batch[self.teacher.main_input_name].shape[:2].numel()
                total += int(given)
        return totals

    @property
    def _names(self) -> list[str]:
        return [layer.name for layer in self.layers]

    def _counted(self, batch: Batch, outputs: Outputs) -> Iterator[tuple[MoELayer, torch.Tensor, torch.Tensor]]:
        """Yield each layer, its outputs [T, D] and which of them count, bool [T]."""
        masks = token_masks(self.teacher, batch)
        for layer in self.layers:
            states = outputs[layer.name]
            mask = mask_of(layer, masks, len(states))
            everywhere = torch.ones(len(states), dtype=torch.bool)
            yield layer, states, (everywhere if mask is None else mask).to(states.device)
