"""Blocks that a checkpoint holds and no model of its class reads, such as layers that predict further tokens (MTP)."""

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from transformers import PreTrainedModel

from hf_mcsmoe.layers.checkpoint import INDEX, WEIGHTS, Conversion, tensors_of_file, weight_map
from hf_mcsmoe.layers.folder import Folder
from hf_mcsmoe.layers.source import Source
from hf_mcsmoe.modeling.companions_mcsmoe import source_of

# Weights of a block at least; what else a model leaves aside are single tensors (of rotary embeddings, an old head).
LEAST = 2


def extra_blocks(source: Source) -> list[str]:
    """Return the paths of the blocks that the source's files hold and its model does not, in their order.

    A result lacks them, since they were never loaded. Of a model that came from no files there are none.
    """
    stored = list(source.stored) if isinstance(source, Folder) else list(_stored_names(source_of(source.model)))
    if not stored:
        return []
    read = {name for part in _conversion(source.model).parts(stored) for name in part.stored}
    known = {prefix for name in read for prefix in _prefixes(name)}
    blocks: dict[str, list[str]] = defaultdict(list)
    for name in stored:
        if name not in read:
            blocks[next(prefix for prefix in [*_prefixes(name), name] if prefix not in known)].append(name)
    return [path for path, names in blocks.items() if sum(name.endswith("weight") for name in names) >= LEAST]


def _conversion(model: PreTrainedModel) -> Conversion:
    return Conversion(model, torch.float32, torch.device("meta"))


def _prefixes(name: str) -> Iterator[str]:
    """Yield the paths that a tensor lies in, from the outermost on."""
    parts = name.split(".")
    yield from (".".join(parts[:depth]) for depth in range(1, len(parts)))


def _stored_names(folder: Path | None) -> Iterable[str]:
    """Return the names of the tensors in a folder's safetensors; none where it has none that can be read."""
    with contextlib.suppress(ValueError):
        if folder and (folder / WEIGHTS).is_file():
            return tensors_of_file(folder / WEIGHTS)
        if folder and (folder / INDEX).is_file():
            return weight_map(folder / INDEX)
    return []
