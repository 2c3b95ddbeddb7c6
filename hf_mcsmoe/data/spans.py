"""Span corruption, the text-to-text task of T5 and of the Switch Transformer, in repeatable form."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

RandomGenerator = random.Random | np.random.Generator


@dataclass(frozen=True)
class SpanNoise:
    """How much of a text is masked; the defaults are T5's.

    Args:
        noise_density: share of the tokens that is masked.
        mean_span: tokens in a masked span, on average.
        fixed_spans: make all spans equally long, see `corrupt_spans`.
    """

    noise_density: float = 0.15
    mean_span: float = 3.0
    fixed_spans: bool = False


def sentinel_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of `<extra_id_0>`, `<extra_id_1>`, ... as far as the vocabulary of `tokenizer` holds them."""
    vocabulary = tokenizer.get_vocab()
    ids: list[int] = []
    while (token := f"<extra_id_{len(ids)}>") in vocabulary:
        ids.append(vocabulary[token])
    return ids


def _random_parts(total: int, parts: int, rng: RandomGenerator) -> list[int]:
    """Split `total` into `parts` positive integers, every split being equally likely."""
    # Sorting random keys needs nothing but `rng.random()`, which Python's and NumPy's generators share.
    order = sorted((rng.random(), cut) for cut in range(1, total))
    cuts = sorted(cut for _, cut in order[: parts - 1])
    return [end - start for start, end in zip([0, *cuts], [*cuts, total], strict=True)]


def _equal_parts(total: int, parts: int) -> list[int]:
    """Split `total` into `parts` integers that differ by one at most."""
    return [total // parts + (part < total % parts) for part in range(parts)]


def corrupt_spans(
    token_ids: list[int],
    sentinel_ids: Sequence[int],
    *,
    noise_density: float,
    mean_span: float,
    rng: RandomGenerator,
    fixed_spans: bool = False,
) -> tuple[list[int], list[int]]:
    """Replace random spans of a text by sentinels and gather what they held, as T5 is trained.

    Of `length` tokens `masked = length * noise_density` go, in `spans = masked / mean_span` spans (rounded, at least
    one). Returns the source, of `length - masked + spans` tokens, and the target, of `masked + spans`: every sentinel
    followed by its span. Neither has an end-of-sequence token. A text of fewer than two tokens has nothing to predict
    from and comes back whole, with an empty target.

    Args:
        fixed_spans: make all spans equally long (`mean_span` tokens, to which the number masked is rounded) instead of
            drawing their lengths around the mean; where the text is too short for that, as equal as can be.
    """
    length = len(token_ids)
    if length < 2 or not sentinel_ids:
        return list(token_ids), []
    masked = min(max(round(length * noise_density), 1), length - 1)
    spans = max(round(masked / mean_span), 1)
    if fixed_spans:
        masked = min(round(spans * mean_span), length - 1)
    spans = min(spans, masked, len(sentinel_ids), length - masked + 1)
    span_lengths = _equal_parts(masked, spans) if fixed_spans else _random_parts(masked, spans, rng)
    # Text has to stand between two spans but need not before the first and after the last one: the two extra tokens
    # shared out here are taken from these ends again.
    gaps = _random_parts(length - masked + 2, spans + 1, rng)
    gaps[0] -= 1
    source, target, position = [], [], 0
    for sentinel, gap, span in zip(sentinel_ids, gaps, span_lengths, strict=False):
        source += [*token_ids[position : position + gap], sentinel]
        position += gap
        target += [sentinel, *token_ids[position : position + span]]
        position += span
    return source + list(token_ids[position:]), target
