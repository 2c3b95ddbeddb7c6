"""How a checkpoint is read block by block."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_mcsmoe.forecast.memory import free_memory
from hf_mcsmoe.layers.folder import Folder
from hf_mcsmoe.layers.streaming import blocks
from hf_mcsmoe.record import Record

# Of the memory that is free at the start, so much is taken unless told otherwise.
SHARE = 0.8


@dataclass(frozen=True)
class StreamConfig:
    """Memory of a streamed run, and whether it begins anew.

    `memory` are bytes for the block in work and for hidden states; None for most of what is free. Hidden states that
    do not fit are mapped from the disk.
    """

    memory: int | None = None
    restart: bool = False

    def check(self, folder: Folder, hidden_bytes: int) -> bool:
        """Return whether hidden states are to be mapped from the disk.

        Raises:
            ValueError: the memory is too small for a block.
        """
        return hidden_bytes > self.room(folder.model)

    def room(self, model: PreTrainedModel) -> int:
        """Return the bytes that there are for hidden states beside the largest block of a model (on meta).

        Raises:
            ValueError: the memory is too small for a block.
        """
        name, block = largest_block(model)
        # The block with what it is converted from, and the student's beside it.
        needed, memory = 2 * block, int(SHARE * free_memory()) if self.memory is None else self.memory
        if memory < needed:
            raise ValueError(
                f"memory={memory / 1e9:.2f} GB is too small for one block: {name} takes {needed / 1e9:.2f} GB with "
                "what is made of it."
            )
        return memory - needed


@dataclass(frozen=True)
class Saving:
    """What is saved beside the weights, and when.

    `tokenizer` in place of the source's; `told` makes of the record of the run that which is saved; `after` is called
    with the folder once it is complete, before the run counts as finished; `scores` is a file to write the statistics
    to, where none were given.
    """

    tokenizer: PreTrainedTokenizerBase | None = None
    told: Callable[[Record], Record] = lambda record: record
    after: Callable[[Path], object] = lambda folder: None
    scores: Path | None = None


def largest_block(model: PreTrainedModel) -> tuple[str, int]:
    """Return the path of a model's largest block, and its bytes."""
    state, sizes = model.state_dict(), dict.fromkeys(["", *blocks(model)], 0)
    for name, tensor in state.items():
        path = next((path for path in sizes if path and name.startswith(f"{path}.")), "")
        sizes[path] += tensor.nbytes
    return max(sizes.items(), key=lambda item: item[1])
