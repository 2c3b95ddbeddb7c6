"""How a checkpoint is read block by block."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_mcsmoe.export.expected import Plain
from hf_mcsmoe.forecast.memory import free_memory
from hf_mcsmoe.layers.folder import Folder
from hf_mcsmoe.layers.streaming import blocks
from hf_mcsmoe.processes import current
from hf_mcsmoe.record import Record
from hf_mcsmoe.search.size import bytes_text
from hf_mcsmoe.streamed.journal import commit_of

# Of the memory that is free at the start, so much is taken unless told otherwise.
SHARE = 0.8
OUTSIDE = ""


@dataclass(frozen=True)
class StreamConfig:
    """Memory of a streamed run, whether it begins anew, and what becomes of shards of the Hub.

    `memory` are bytes for the block in work and for hidden states; None for most of what is free. Hidden states that
    do not fit are mapped from the disk. With `drop_source_cache` shards that were fetched leave the Hub's cache once
    no later block needs them.
    """

    memory: int | None = None
    restart: bool = False
    drop_source_cache: bool = False

    def opened(self, source: str | os.PathLike, output: Path, **options: Any) -> Folder:
        """Return the checkpoint of a run to `output`: of a Hub id the commit that a run which goes on began with.

        Args:
            options: see `Folder`.

        Raises:
            ValueError: see `Folder` and `check_drops`.
        """
        self.check_drops(source)
        commit = current().agreed(lambda: None if self.restart else commit_of(output))
        return Folder(source, commit=commit, drops=self.drop_source_cache, **options)

    def check_drops(self, source: str | os.PathLike | Folder) -> None:
        """Raise ValueError where shards are to be dropped of a source of which none are."""
        if not self.drop_source_cache:
            return
        opened = source if isinstance(source, Folder) else None
        name = str(opened.model.name_or_path if opened else source)
        if Path(name).expanduser().is_dir():
            raise ValueError(
                f"{name} is a folder, of which nothing is fetched into the Hub's cache: leave out --drop-source-cache "
                "(drop_source_cache=True), or name a Hub id."
            )
        if opened and not opened.drops:
            raise ValueError(
                "drop_source_cache=True says nothing to a Folder that is open already: open it with drops=True, or "
                f"pass {name!r} itself."
            )

    def check(self, folder: Folder, hidden_bytes: int) -> bool:
        """Return whether hidden states are to be mapped from the disk.

        Raises:
            ValueError: the memory is too small for a block.
        """
        return hidden_bytes > self.room(folder.model)

    def room(self, model: PreTrainedModel) -> int:
        """Return the bytes that there are for hidden states beside the weights of a model (on meta) that are held.

        Raises:
            ValueError: the memory is too small for a block and what lies outside of the blocks.
        """
        needed, memory = held_bytes(model), int(SHARE * free_memory()) if self.memory is None else self.memory
        if memory < needed:
            sizes = _sizes(model)
            outside = sizes.pop(OUTSIDE)
            name, block = max(sizes.items(), key=lambda item: item[1])
            raise ValueError(
                f"{bytes_text(memory)} of memory are too small for one block: {name} takes {bytes_text(2 * block)} "
                f"with what is made of it, and {bytes_text(outside)} lie outside of the blocks. It takes "
                f"{bytes_text(needed)} or more (--memory)."
            )
        return memory - needed


@dataclass(frozen=True)
class Saving:
    """What is saved beside the weights, and when.

    `tokenizer` in place of the source's; `told` makes of the record of the run that which is saved; `after` is called
    with the folder once it is complete, before the run counts as finished; `scores` is a file to write the statistics
    to, where none were given. `plain` says which plain checkpoint takes the place of the result.
    """

    tokenizer: PreTrainedTokenizerBase | None = None
    told: Callable[[Record], Record] = lambda record: record
    after: Callable[[Path], object] = lambda folder: None
    scores: Path | None = None
    plain: Plain | None = None


def held_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of weights that are in memory at the largest block of a model.

    These are what lies outside of the blocks and, twice, the block: with what it is converted from, or the student's.
    """
    sizes = _sizes(model)
    return sizes.pop(OUTSIDE) + 2 * max(sizes.values(), default=0)


def _sizes(model: PreTrainedModel) -> dict[str, int]:
    """Return the bytes of each of a model's blocks by its path, and of what lies in none; what is tied counts once."""
    sizes = dict.fromkeys([OUTSIDE, *blocks(model)], 0)
    paths = [path for path in sizes if path != OUTSIDE]
    distinct = {id(tensor): (name, tensor) for name, tensor in reversed(model.state_dict(keep_vars=True).items())}
    for name, tensor in distinct.values():
        path = next((path for path in paths if name.startswith(f"{path}.")), OUTSIDE)
        sizes[path] += tensor.nbytes
    return sizes
