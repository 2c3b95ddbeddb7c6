"""The effect on a model of another output of one layer, measured on a few rows without changing the model."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_mcsmoe.calibration.inputs import held_out_sequences, num_sequences
from hf_mcsmoe.data.domains import chosen_rows
from hf_mcsmoe.evaluation.held_out import Judge
from hf_mcsmoe.layers.batches import Batch, hooks, mask_of, token_masks
from hf_mcsmoe.layers.layer import MoELayer
from hf_mcsmoe.layers.packing import apart
from hf_mcsmoe.methods.routed import Routed

# Bytes for the original's distributions on the rows.
MEMORY_LIMIT = 500_000_000
# Tokens of the rows, a batch more or less.
TOKENS = 4096


class Probe:
    """Rows of some batches, and what the original model says of them: those that no fit sees, where they can be taken.

    What a layer misses where it was fitted is small, and is of another kind than what it misses elsewhere.
    """

    def __init__(self, model: PreTrainedModel, batches: Sequence[Batch]) -> None:
        """Take the rows, and run the original on them."""
        rows = list(apart(model, batches))
        judges = held_out_rows(rows)
        self.model, self.batches, self.is_held_out = model, few_batches(judges or rows), bool(judges)
        self.judge = Judge(self.batches, memory_limit=MEMORY_LIMIT)
        self.effects: dict[int, float] = {}  # of each trial, in nats, by its number
        self.trials = 0
        self._remember()

    def _remember(self) -> None:
        self.judge.remember(self.model)

    @property
    def tells(self) -> bool:
        """Whether the model gives distributions that can be compared."""
        return bool(self.judge.kept)

    def check(self) -> None:
        """Raise ValueError where the model gives no distributions that can be compared."""
        if not self.tells:
            raise ValueError(
                f"{type(self.model).__name__} tells no distribution on these batches, by which a choice would be "
                "measured: load it with its head, and give an encoder-decoder labels."
            )

    def trial(self, layer: MoELayer, difference: torch.Tensor) -> tuple[float, int]:
        """Try another output of a layer, see `measure`; return its error and the number of the trial in `effects`."""
        number, self.trials = self.trials, self.trials + 1
        error, self.effects[number] = self.measure(layer, difference)
        return error, number

    def measure(self, layer: MoELayer, difference: torch.Tensor) -> tuple[float, float]:
        """Return the squared norm per row of what a layer gives more, and the divergence that follows, in nats.

        Args:
            difference: [n, D] of the layer's output at the tokens that count, in the order of the batches; those of
                further batches are not read. Of a layer whose inputs are scaled a row per pick.
        """
        used: list[int] = []
        masks = [token_masks(self.model, batch) for batch in self.batches]
        with torch.no_grad(), hooks() as handles:
            handles.extend(changed(layer, difference, masks, used))
            self.judge.measure("changed", self.model)
        return missed(difference, used), max(self.judge.quality.pop("changed").kl or 0.0, 0.0)

    def tokens(self, held_out: torch.Tensor) -> torch.Tensor:
        """Return the tokens that the rows begin with, int [n], of all those of a layer.

        Args:
            held_out: which of them judge, bool [T].
        """
        return held_out.nonzero()[:, 0] if self.is_held_out else torch.arange(len(held_out))

    @property
    def positions(self) -> int:
        """Positions of the rows, those that do not count included."""
        return sum(map(positions_of, self.batches))


def held_out_rows(batches: Sequence[Batch]) -> list[Batch]:
    """Return the rows that judge a fit, see `held_out_sequences`; nothing where a batch cannot be parted into rows."""
    return parted_rows(batches)[1]


def parted_rows(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Return the rows that a fit sees and those that judge it; all and none where a batch has no rows of its own."""
    total = sum(map(num_sequences, batches))
    judges = set(held_out_sequences(total))
    parts, first = (list[Batch](), list[Batch]()), 0
    for batch in batches:
        number = num_sequences(batch)
        tensors = [value for value in batch.values() if isinstance(value, torch.Tensor)]
        if total == 1 or len(tensors) < len(batch) or any(value.shape[:1] != (number,) for value in tensors):
            return list(batches), []
        judging = [first + row in judges for row in range(number)]
        first += number
        for part, wanted in zip(parts, (False, True), strict=True):
            if rows := [row for row, judge in enumerate(judging) if judge is wanted]:
                part.append(chosen_rows(batch, rows))
    return parts


def few_batches(batches: Sequence[Batch]) -> list[Batch]:
    """Return the first batches, until they have enough tokens for an effect to be measured on."""
    chosen, tokens = list[Batch](), 0
    for batch in batches:
        if tokens >= TOKENS:
            break
        chosen.append(batch)
        tokens += positions_of(batch)
    return chosen


def positions_of(batch: Batch) -> int:
    """Return the positions of a batch, those that do not count included."""
    return max((value.shape[:2].numel() for value in batch.values() if isinstance(value, torch.Tensor)), default=0)


def missed(difference: torch.Tensor, used: Sequence[int]) -> float:
    """Return the squared norm per row of a difference, of the rows that were `used`."""
    return float(difference[: sum(used)].square().sum(1).mean())


def changed(
    layer: MoELayer, difference: torch.Tensor, masks: Sequence[dict[str, torch.Tensor]], used: list[int]
) -> Iterator[Any]:
    """Yield the hooks that add a difference to a layer's output, forward by forward; note how many rows are `used`."""
    coming, waiting = iter(masks), list[torch.Tensor]()

    def take(routed: Routed) -> None:
        tokens = len(routed.logits)
        counted = mask_of(layer, next(coming), tokens)
        counted = torch.ones(tokens, dtype=torch.bool) if counted is None else counted.cpu()
        picks = 1 if routed.scale is None else routed.index.shape[1]
        number = int(counted.sum()) * picks
        added = torch.zeros(tokens, difference.shape[1])
        added[counted] = difference[sum(used) :][:number].unflatten(0, (-1, picks)).sum(1)
        used.append(number)
        waiting.append(added)

    def add(module: nn.Module, arguments: tuple, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        changed = first + waiting.pop().to(first).view_as(first)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    yield from layer.routed(take)
    yield layer.model.get_submodule(layer.output_name).register_forward_hook(add)
