"""The effect of another output of one layer, of a model of which one block at a time is in memory.

A copy of what the probe's rows have become before a block passes it with the change, and later blocks after it, each
while that is there. Between blocks copies lie on disk; of each trial there is one, and none of them waits in memory.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_mcsmoe.evaluation.held_out import Measure, predictions
from hf_mcsmoe.layers.batches import Batch, evaluation_mode, hooks, token_masks
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.layer import MoELayer
from hf_mcsmoe.layers.packing import apart
from hf_mcsmoe.layers.streaming import Forward
from hf_mcsmoe.methods.config import MergeConfig
from hf_mcsmoe.search.choices import ranks
from hf_mcsmoe.search.config import SizeConfig
from hf_mcsmoe.search.probe import Probe, changed, few_batches, held_out_rows, missed, positions_of
from hf_mcsmoe.streamed.parts import JUDGED, ORIGINAL, Key
from hf_mcsmoe.streamed.states import States


def trials_bytes(layers: Layers, batches: Sequence[Batch], merge: MergeConfig, search: SizeConfig) -> int:
    """Return about how many bytes the copies of all trials are on disk when they have passed the last block."""
    rows = list(apart(layers.model, batches))
    return copies_bytes(layers, sum(map(positions_of, few_batches(held_out_rows(rows) or rows))), merge, search)


def copies_bytes(layers: Layers, tokens: int, merge: MergeConfig, search: SizeConfig) -> int:
    """Return about how many bytes the copies of trials on so many tokens are on disk."""
    text, number = layers.model.config.get_text_config(), 0
    for shared in layers.selected(merge.skip).tied:
        bits = len(search.bits)
        number += 2 * min(2, bits) + 3 * len(search.reductions) + min(3, bits + 1) * len(ranks(shared, search))
    return number * tokens * text.hidden_size * layers.model.dtype.itemsize


class Trials(Probe):
    """A probe of which each trial is known when its copy has passed the last block."""

    def __init__(self, model: PreTrainedModel, batches: Sequence[Batch], states: States) -> None:
        """Take the rows; the original says what it does of them in the forwards of `forwards`."""
        super().__init__(model, batches)
        self.states = states
        self.passed: list[str] = []  # blocks
        self.path = ""  # of the block that is in memory

    def _remember(self) -> None:
        """Wait for the forwards."""
        self._original = self.judge.of_original()

    @property
    def tells(self) -> bool:
        """Whether what came out of all trials could be compared, once these have passed all blocks."""
        return len(self.effects) == self.trials > 0

    def forwards(self) -> list[Forward]:
        """Return the original's forwards, which are to pass each block before the trials do."""
        return [
            Forward(partial(self._take, self._original, number, batch), Key(ORIGINAL, JUDGED, number))
            for number, batch in enumerate(self.batches)
        ]

    def told(self) -> dict[str, Any]:
        """Return what is known of the trials, as JSON values."""
        return {"trials": self.trials, "effects": list(self.effects.items())}

    def resume(self, told: Mapping[str, Any], passed: Sequence[str]) -> None:
        """Go on after the blocks that were `passed`, with what `told` gave then."""
        self.trials, self.effects, self.passed = told["trials"], dict(map(tuple, told["effects"])), [*passed]

    def trial(self, layer: MoELayer, difference: torch.Tensor) -> tuple[float, int]:
        """Begin a trial at the block in memory, in which the layer is; see `Probe.trial`."""
        number, used = self.trials, list[int]()
        self.trials += 1
        masks = [token_masks(self.model, batch) for batch in self.batches]
        with hooks() as handles:
            handles.extend(changed(layer, difference, masks, used))
            self._advance(number, is_new=True)
        return missed(difference, used), number

    def pass_block(self) -> None:
        """Let all trials that there are pass the block in memory."""
        for number in range(self.trials):
            self._advance(number)

    def _advance(self, number: int, *, is_new: bool = False) -> None:
        """Let a trial pass the block in memory; a new one comes from where the original is."""
        name, measure = f"trial {number}", self.judge.of_stage(f"trial {number}")
        block: nn.Module = self.model.get_submodule(self.path)
        with evaluation_mode(block):  # type: ignore[arg-type]
            for place, batch in enumerate(self.batches):
                key, before = Key(name, JUDGED, place), Key(ORIGINAL, JUDGED, place)
                one = Forward(partial(self._take, measure, place, batch), key, self.passed)
                try:
                    with self.states.replayed(self.model, self.passed, *([before] if is_new else [key, before])):
                        one.resume()
                    if one.block == self.path:
                        one.resume()
                finally:
                    one.give_up()
        measure.close()
        if (quality := self.judge.quality.pop(name, None)) is not None:
            self.effects[number] = max(quality.kl or 0.0, 0.0)

    def _take(self, measure: Measure, number: int, batch: Batch) -> None:
        measure.take(number, predictions(self.model, batch))
