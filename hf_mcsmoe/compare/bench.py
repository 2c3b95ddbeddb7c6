"""What results are judged on: texts on which the original's predictions are kept, and inputs of its layers."""

from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel

from hf_mcsmoe.calibration.inputs import LayerInputs, capture_inputs, num_sequences
from hf_mcsmoe.compare.cells import Figures
from hf_mcsmoe.evaluation.held_out import MEMORY_LIMIT, Judge
from hf_mcsmoe.layers.batches import Batch, evaluation_mode
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.folder import Folder
from hf_mcsmoe.layers.source import Source
from hf_mcsmoe.progress import Progress, one_after_another, silent
from hf_mcsmoe.repair.fit import LayerFit, layer_error, original_sum
from hf_mcsmoe.repair.repair import Pair, map_of_fit, matching_layers, student_inputs

# Positions at which the outputs of layers are compared, a row more or less.
POSITIONS = 1024
ORIGINAL = "original"


class Bench:
    """The original's layers, and what is kept of it to compare results with; it runs once over each text.

    Args:
        layers: of a model, or of a `Folder`, of which no outputs of layers are compared.
        texts: batches by the name of their text; the outputs of layers are compared on rows of the first.
    """

    def __init__(self, layers: Layers, texts: Mapping[str, Sequence[Batch]], progress: Progress = silent) -> None:
        tell = one_after_another(progress, len(texts))
        self.layers, self.judges = layers, dict[str, Judge]()
        for name, batches in texts.items():
            judge = Judge(
                batches, memory_limit=MEMORY_LIMIT // len(texts), progress=lambda *done: tell("judging", *done)
            )
            judge.remember(layers.source)
            judge.progress = None
            self.judges[name] = judge
        self.rows = first_rows(next(iter(texts.values())), POSITIONS)
        self.inputs = {} if isinstance(layers.source, Folder) else self._captured()
        self.targets = dict[str, torch.Tensor]()

    @property
    def original(self) -> dict[str, Figures]:
        """What the original is worth on each text."""
        return {name: _figures(judge, ORIGINAL) for name, judge in self.judges.items()}

    def figures(self, student: PreTrainedModel | Source) -> dict[str, Figures]:
        """Return what a result is worth on each text."""
        found = {}
        for name, judge in self.judges.items():
            judge.measure("student", student)
            found[name] = _figures(judge, "student")
        return found

    @torch.no_grad()
    def layer_errors(self, student: PreTrainedModel) -> dict[str, float]:
        """Return the squared error of each layer's output over the squared output, at the original's own inputs.

        Of layers that share experts it is told under the first's name; of a layer that was left as it was it is 0.
        """
        if not self.inputs:
            return {}
        found, errors = Layers.of(student), dict.fromkeys(self.inputs, 0.0)
        if not any(layer.merged for layer in found):
            return errors
        with evaluation_mode(student), evaluation_mode(self.layers.model):
            for pairs in matching_layers(found, self.layers):
                errors[pairs[0][1].name] = self._error(pairs)
        return errors

    def _error(self, pairs: list[Pair]) -> float:
        layer, original = pairs[0]
        inputs = self.inputs[original.name]
        with original.open() as weights:
            seen = student_inputs(pairs, inputs, self.rows)
            fit = LayerFit(layer.name, layer.container, weights, seen, inputs, map_of_fit(layer))
            if original.name not in self.targets:
                self.targets[original.name] = original_sum(fit, normed=original.is_normed)
            target = self.targets[original.name]
            missed = layer_error(fit, fit.experts, target, torch.arange(len(target)))
        size = float(target.square().sum())
        return missed / size if size else 0.0

    def _captured(self) -> dict[str, LayerInputs]:
        captured = capture_inputs(list(self.layers), self.rows)
        found = {}
        for shared in self.layers.tied:
            first, *others = (captured.pop(layer.name) for layer in shared)
            found[shared[0].name] = sum(others, first)
        return found


def _figures(judge: Judge, stage: str) -> Figures:
    quality = judge.quality.get(stage)
    return Figures() if quality is None else Figures(quality.kl, quality.loss)


def first_rows(batches: Sequence[Batch], positions: int) -> list[Batch]:
    """Return the first rows of batches, so many positions of them; whole batches where rows cannot be parted."""
    chosen, left = list[Batch](), positions
    for batch in batches:
        if left <= 0:
            break
        rows, tensors = num_sequences(batch), [value for value in batch.values() if isinstance(value, torch.Tensor)]
        length = max((value.shape[1] for value in tensors if value.ndim > 1), default=1)
        number = min(rows, max(1, left // length))
        if number < rows and len(tensors) == len(batch) and all(len(value) == rows for value in tensors):
            batch = {name: value[:number] for name, value in batch.items()}
        chosen.append(batch)
        left -= number * length
    return chosen
