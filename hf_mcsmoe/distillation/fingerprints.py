"""Hashes that tell whether a run has the rows and the weights that another one had."""

import hashlib
import inspect
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

# So many rows of a data set, and so many entries of a weight, tell it from another one.
ROWS, ENTRIES = 1024, 16


def rows_fingerprint(dataset: Any, model: PreTrainedModel, rows: Iterable[int]) -> str:
    """Return a hash of some rows; lists, arrays and tensors of the same numbers count as the same.

    Of a row, the columns that the model takes; all of them where it takes none, as of text that a collator encodes.
    """
    digest, known = hashlib.sha256(), {*inspect.signature(model.forward).parameters, "label", "label_ids"}
    for number in rows:
        row = dataset[number]
        columns = dict(row) if isinstance(row, Mapping) else {"row": row}
        taken = {name: value for name, value in columns.items() if name in known}
        digest.update(json.dumps(taken or columns, sort_keys=True, default=_plain).encode())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """Return values that JSON knows; of an object that it does not, the type: its text may hold its address."""
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return value.tolist()
    return value.hex() if isinstance(value, bytes) else f"{type(value).__module__}.{type(value).__qualname__}"


def sample_fingerprint(dataset: Any, model: PreTrainedModel) -> str:
    """Return a hash of the number of rows and of up to 1024 of them, spread evenly.

    Empty where nothing can be said: rows without numbers, or that are drawn anew whenever they are read.
    """
    if not isinstance(dataset, Sized) or not hasattr(dataset, "__getitem__"):
        return ""
    count = len(dataset)
    chosen = range(count) if count <= ROWS else [number * count // ROWS for number in range(ROWS)]
    with _randomness_restored():
        first, second = (rows_fingerprint(dataset, model, chosen) for _ in range(2))
    return f"{count} rows {first}" if first == second else ""


@contextmanager
def _randomness_restored() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(python)
    np.random.set_state(numpy)


def weights_fingerprint(weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return a hash of some entries of each weight, whatever its dtype's name; of weights that are here, as wholes."""
    digest = hashlib.sha256()
    for name, tensor in weights:
        if isinstance(tensor, DTensor) or tensor.is_meta or not tensor.numel():
            continue
        flat = tensor.detach().flatten()
        entries = flat[:: max(1, len(flat) // ENTRIES)][:ENTRIES].float().cpu()
        digest.update(f"{name} {tuple(tensor.shape)} {entries.tolist()}".encode())
    return digest.hexdigest()
