"""What a user passes as batches: batches, or texts and rows of a data set that a tokenizer makes batches of."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_mcsmoe.data.calibration import calibration_batches
from hf_mcsmoe.data.features import Feature, feature_batches, text_features
from hf_mcsmoe.data.text import Sample, samples_of

NUM_SAMPLES, MAX_LENGTH, BATCH_SIZE = 256, 512, 8
# Columns of rows that are tokens already.
TOKENS = ("input_ids", "attention_mask", "labels")
Batch = Mapping[str, Any]


def as_batches(
    given: Any, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, *, labelled: bool = False
) -> Iterable[Batch]:
    """Return batches for `model(**batch)`: those that are given, or what a tokenizer makes of texts or of rows.

    Args:
        given: batches; or with a `tokenizer` texts, or rows of a data set with a column of text, conversations or
            tokens. All of them count, long texts in windows of 512 tokens.
        labelled: whether all tokens are to be predicted, to measure a loss, rather than seen.

    Raises:
        TypeError: it is none of these, or a tokenizer is missing; the message says what batches are.
        ValueError: rows that hold something else, see `samples_of`.
    """
    if isinstance(given, str | bytes | Path | Mapping | torch.Tensor | PreTrainedTokenizerBase):
        raise TypeError(_told(given))
    try:
        iterator = iter(given)
    except TypeError:
        raise TypeError(_told(given)) from None
    first = next(iterator, None)
    if first is None:
        return ()
    # What has a length is handed on as it is, and from anything else nothing is taken twice.
    given = given if isinstance(given, Sequence) else chain([first], iterator)
    if _is_batch(first):
        return given
    if tokenizer is None or not isinstance(first, str | Mapping | Sequence):
        raise TypeError(_told(first, listed=True))
    if isinstance(first, Mapping) and TOKENS[0] in first:
        return feature_batches([_feature(row) for row in given], tokenizer, BATCH_SIZE)
    return _made(samples_of(given, "batches"), model, tokenizer, labelled)


def _made(
    samples: list[Sample], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, labelled: bool
) -> list[dict[str, torch.Tensor]]:
    if not labelled:
        return calibration_batches(samples, tokenizer, model, num_samples=max(NUM_SAMPLES, len(samples)))
    encoder_decoder = model.config.is_encoder_decoder
    features = text_features(samples, tokenizer, encoder_decoder=encoder_decoder, max_length=MAX_LENGTH)
    return feature_batches(features, tokenizer, BATCH_SIZE)


def _is_batch(value: Any) -> bool:
    """Tell whether a value holds something of a batch: an array of at least two axes."""
    return isinstance(value, Mapping) and any(
        isinstance(item, torch.Tensor | np.ndarray) and item.ndim > 1 for item in value.values()
    )


def _feature(row: Any) -> Feature:
    """Return a row of tokens as lists."""
    given = {name: row[name] for name in TOKENS if row.get(name) is not None}
    lists = {name: [int(token) for token in values] for name, values in given.items()}
    return {"attention_mask": [1] * len(lists["input_ids"]), **lists}


def _told(value: Any, *, listed: bool = False) -> str:
    """Return what batches are, and that this is none."""
    held = f" of {', '.join(map(repr, value))}" if isinstance(value, Mapping) else ""
    kind = f"{type(value).__name__}{held:.200}"
    return (
        "batches must be a list, or any other iterable, of dictionaries of tensors [batch, length] for "
        f"model(**batch), and {'its first item is' if listed else 'this is'} {kind}: wrap a single batch in a list; "
        "of texts, or of rows of a data set, calibration_batches(samples_of(rows, name), tokenizer, model) of "
        "hf_mcsmoe.data makes them, and so does collect_statistics(model, rows, tokenizer=tokenizer)."
    )


def digest(batches: Iterable[Batch]) -> str:
    """Return a hash of batches: of all their tensors, and of their names."""
    found = hashlib.sha256()
    for batch in batches:
        for name, value in sorted(batch.items()):
            if isinstance(value, torch.Tensor):
                found.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
                found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
