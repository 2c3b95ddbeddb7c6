"""The data of a run: what passes the blocks, and how many bytes of hidden states wait there."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from hf_mcsmoe.calibration.inputs import num_sequences
from hf_mcsmoe.evaluation.held_out import Judge
from hf_mcsmoe.layers.batches import Batch
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.packing import apart, unpacked
from hf_mcsmoe.layers.streaming import blocks
from hf_mcsmoe.methods.config import MergeConfig
from hf_mcsmoe.processes import Processes
from hf_mcsmoe.repair.made import made_batches
from hf_mcsmoe.repair.methods import RepairConfig
from hf_mcsmoe.streamed.chain import Asked
from hf_mcsmoe.streamed.parts import Rows


@dataclass(frozen=True)
class Data:
    """The calibration batches of a model, one of them to measure costs on, and the repair that makes rows of them."""

    model: PreTrainedModel
    batches: Sequence[Batch]
    sample: Batch | None
    repair: RepairConfig | None

    def rows(self) -> Rows:
        """Return what passes the blocks."""
        repair, encoder_decoder = self.repair, self.model.config.is_encoder_decoder
        made = made_batches(self.model, self.batches, repair.made, repair.seed) if repair else []
        sample = self.sample and unpacked(self.sample, encoder_decoder=encoder_decoder)
        return Rows(list(apart(self.model, self.batches)), list(apart(self.model, made)), sample)

    @property
    def sequences(self) -> int:
        """How many sequences are fitted to."""
        return sum(map(num_sequences, self.batches))

    def hidden_bytes(self, config: MergeConfig, asked: Asked, judge: Judge) -> int:
        """Return about how many bytes of hidden states wait at a block."""
        streams = 2 if asked.size else 1 + sum(map(bool, asked.stages.values()))
        tokens = sum(_tokens(batch) for batch in self.batches) * (2 if self.repair else 1)
        tokens *= 1 + asked.fitting_streams(config)
        tokens += (1 + streams) * sum(map(_tokens, judge.all_batches))
        counted = 2 if asked.size else 1 + asked.is_stored
        tokens += 0 if self.sample is None else (1 + counted) * _tokens(self.sample)
        return tokens * self._width

    def share_bytes(self, processes: Processes) -> int:
        """Return about how many bytes of hidden states wait in this process in a first sweep that several share."""
        return self.bytes_of(processes.own(self.batches))

    def bytes_of(self, batches: Iterable[Batch]) -> int:
        """Return about how many bytes of hidden states some batches have between two blocks."""
        return sum(map(_tokens, batches)) * self._width

    def back_bytes(self, layers: Layers, processes: Processes) -> int:
        """Return about how many bytes of hidden states, and of what routers say, wait here while gradients are summed.

        They are those of all blocks, and gradients at two of them.
        """
        tokens, width = sum(map(_tokens, processes.own(self.batches))), self.model.dtype.itemsize
        said = sum(2 * width * layer.num_experts + 12 * (layer.top_k or 1) for layer in layers)
        return (len(blocks(self.model)) + 2) * self.share_bytes(processes) + 2 * tokens * said

    @property
    def _width(self) -> int:
        """The bytes of a token's hidden state."""
        return self.model.config.get_text_config().hidden_size * self.model.dtype.itemsize


def _tokens(batch: Batch) -> int:
    return max((x.shape[:2].numel() for x in batch.values() if isinstance(x, torch.Tensor)), default=0)
