"""Calibration data: samples drawn at random, long texts in windows. Only what is drawn is turned into tokens."""

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_mcsmoe.data.chat import Chat, written
from hf_mcsmoe.data.domains import DOMAIN
from hf_mcsmoe.data.features import T5_NOISE, Feature, feature_batches, pair_features, span_features
from hf_mcsmoe.data.spans import SpanNoise, sentinel_token_ids
from hf_mcsmoe.data.text import Sample, check_token_ids
from hf_mcsmoe.progress import Progress, silent

# Rows that are turned into tokens at a time.
CHUNK = 64


@dataclass(frozen=True)
class Drawn:
    """Features of random samples, the shortest first, and how much of the data they are.

    `rows` of `rows_there` were turned into tokens, and `tokens` of theirs, of about `tokens_there`, are used; `asked`
    is the number of samples that were to be drawn.
    """

    features: list[Feature]
    asked: int
    rows: int
    rows_there: int
    tokens: int
    tokens_there: int

    def __add__(self, other: "Drawn") -> "Drawn":
        """Return what was drawn of both data."""
        sums = (getattr(self, name) + getattr(other, name) for name in list(vars(self))[1:])
        return Drawn(_by_length([*self.features, *other.features]), *sums)

    def __str__(self) -> str:
        """Say what was used of what there is, and whether that is less than was asked for."""
        about = "" if self.rows == self.rows_there else "about "
        told = (
            f"{len(self.features):,} samples: {self.tokens:,} of {about}{self.tokens_there:,} tokens, "
            f"{self.rows:,} of {self.rows_there:,} rows"
        )
        lacking = len(self.features) < self.asked
        return told + (f"; {self.asked:,} samples were asked for, and the data hold no more" if lacking else "")


@dataclass(frozen=True)
class _Window:
    """A part of a sample: its tokens, what makes the feature of it, and the tokens that are cut off behind it."""

    tokens: int
    feature: Callable[[], Feature]
    lost: int = 0


def calibration_batches(
    samples: Sequence[Sample],
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    *,
    num_samples: int = 256,
    max_length: int = 512,
    batch_size: int = 8,
    seed: int = 0,
    noise: SpanNoise = T5_NOISE,
) -> list[dict[str, torch.Tensor]]:
    """Return batches [batch, length] of random samples, a row a sample, for `model(**batch)`.

    Arguments and errors are those of `calibration_features`.
    """
    features = calibration_features(
        samples, tokenizer, model, num_samples=num_samples, max_length=max_length, seed=seed, noise=noise
    )
    return feature_batches(features, tokenizer, batch_size, by_length=False)


def calibration_features(
    samples: Sequence[Sample],
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    *,
    num_samples: int = 256,
    max_length: int = 512,
    seed: int = 0,
    noise: SpanNoise = T5_NOISE,
) -> list[Feature]:
    """Return random samples as features, a row a sample, the shortest first.

    Args:
        samples: see `read_samples`.
        num_samples: the paper uses 256.
        max_length: of a sample or a target, in tokens. Longer texts are cut into samples of this length; of each text
            the first of them comes before the others of any, and those are drawn at random.
        noise: how a text without a target is corrupted for an encoder-decoder.

    Raises:
        ValueError: no samples; conversations for a tokenizer without a chat template; a tokenizer with more tokens
            than the model has embeddings.
    """
    encoder_decoder = model.config.is_encoder_decoder
    options: dict[str, Any] = {"num_samples": num_samples, "max_length": max_length, "seed": seed}
    drawn = draw(samples, tokenizer, encoder_decoder=encoder_decoder, **options, noise=noise)
    check_token_ids(max(max(feature["input_ids"]) for feature in drawn.features), model)
    return drawn.features


def draw(
    samples: Sequence[Sample],
    tokenizer: PreTrainedTokenizerBase,
    *,
    encoder_decoder: bool,
    num_samples: int,
    max_length: int,
    seed: int = 0,
    noise: SpanNoise = T5_NOISE,
    domains: Sequence[int] = (),
    progress: Progress = silent,
) -> Drawn:
    """Draw random samples; see `calibration_features`.

    Args:
        domains: the number of the data set of each sample, which its features then tell.
        progress: called as `progress("tokenising", rows done, rows)`.

    Raises:
        ValueError: no samples, samples of no token, or a tokenizer without a chat template for conversations.
    """
    if not samples:
        raise ValueError("There are no samples to calibrate on.")
    places = random.Random(seed).sample(range(len(samples)), min(num_samples, len(samples)))
    chosen = [samples[place] for place in places]
    rows: list[list[_Window]] = []
    progress("tokenising", 0, len(chosen))
    for start in range(0, len(chosen), CHUNK):
        part = chosen[start : start + CHUNK]
        rows += _windows(part, tokenizer, encoder_decoder, max_length, seed, noise)
        progress("tokenising", len(rows), len(chosen))
    if domains:
        rows = [_of_domain(domains[place], windows) for place, windows in zip(places, rows, strict=True)]
    first = [windows[0] for windows in rows if windows]
    others = [window for windows in rows for window in windows[1:]]
    used = first + random.Random(seed).sample(others, min(num_samples - len(first), len(others)))
    if not used:
        raise ValueError("The samples to calibrate on hold no token.")
    read = sum(window.tokens + window.lost for windows in rows for window in windows)
    there = read
    if len(chosen) < len(samples):
        there = round(read * _letters(samples) / _letters(chosen))
    features = _by_length([window.feature() for window in used])
    return Drawn(features, num_samples, len(chosen), len(samples), sum(window.tokens for window in used), there)


def sample_features(
    samples: Sequence[Sample],
    tokenizer: PreTrainedTokenizerBase,
    *,
    encoder_decoder: bool,
    max_length: int,
    seed: int = 0,
    noise: SpanNoise = T5_NOISE,
) -> list[Feature]:
    """Return one feature a sample, in the order of the samples: what a model sees of a text, not what it is to learn.

    A model without an encoder sees the text alone. An encoder-decoder gets the target; without one, spans of the text
    are masked, as T5 is trained, where the tokenizer has sentinels, and otherwise the text is its own target.
    """
    rows = _windows(samples, tokenizer, encoder_decoder, max_length, seed, noise)
    return [windows[0].feature() for windows in rows if windows]


def _by_length(features: list[Feature]) -> list[Feature]:
    """Return features of like length side by side: less padding, so less of a pass is spent on nothing."""
    return sorted(features, key=lambda feature: len(feature["input_ids"]))


def _letters(samples: Sequence[Sample]) -> int:
    """Return about how much text there is, at least 1."""
    parts = (text if isinstance(text, str) else str(text.messages) for text, _ in samples)
    return max(sum(map(len, parts)), 1)


def _windows(
    samples: Sequence[Sample],
    tokenizer: PreTrainedTokenizerBase,
    encoder_decoder: bool,
    max_length: int,
    seed: int,
    noise: SpanNoise,
) -> list[list[_Window]]:
    """Return each sample as the windows of at most `max_length` tokens that it is cut into."""
    if not samples:
        return []
    texts = [written(text, tokenizer) for text, _ in samples]
    masked = encoder_decoder and samples[0][1] is None and bool(sentinel_token_ids(tokenizer))
    if encoder_decoder and not masked:
        targets = [text if target is None else target for text, (_, target) in zip(texts, samples, strict=True)]
        return _pair_windows(texts, targets, tokenizer, max_length)
    special = _special_tokens(tokenizer)
    rows = []
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    for text, tokens, (given, _) in zip(texts, encoded, samples, strict=True):
        # A chat template writes such tokens itself, and masked spans bring their own.
        parts = _cut(tokens, max_length, *(([], []) if masked or isinstance(given, Chat) else special))
        # Seeded by the text itself: its masks are the same in any subset, order and batch size.
        keys = [f"{seed}:{text}", *(f"{seed}:{number}:{text}" for number in range(1, len(parts)))]
        rows.append(
            [
                _Window(len(part), partial(_masked, part, key, tokenizer, noise) if masked else partial(_plain, part))
                for part, key in zip(parts, keys, strict=False)
            ]
        )
    return rows


def _of_domain(number: int, windows: Sequence[_Window]) -> list[_Window]:
    """Return windows whose features tell the number of their data set."""
    return [replace(window, feature=partial(_with_domain, number, window.feature)) for window in windows]


def _with_domain(number: int, feature: Callable[[], Feature]) -> Feature:
    return {**feature(), DOMAIN: [number]}


def _plain(tokens: list[int]) -> Feature:
    return {"input_ids": tokens, "attention_mask": [1] * len(tokens)}


def _masked(tokens: list[int], key: str, tokenizer: PreTrainedTokenizerBase, noise: SpanNoise) -> Feature:
    (feature,) = span_features([tokens], [key], tokenizer, noise)
    return feature


def _pair_windows(
    texts: list[str], targets: list[str], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[list[_Window]]:
    """Return sources and targets, each cut to its length: what is behind that belongs to neither's rest."""
    pairs = list(zip(texts, targets, strict=True))
    tokenizer = copy.deepcopy(tokenizer)  # truncation stays set in one that was called with it
    lengths = [len(feature["input_ids"]) for feature in pair_features(pairs, tokenizer)]
    features = pair_features(pairs, tokenizer, max_length, max_length)
    used = [len(feature["input_ids"]) for feature in features]
    return [
        [_Window(tokens, partial(dict, feature), length - tokens)]
        for feature, tokens, length in zip(features, used, lengths, strict=True)
    ]


def _cut(tokens: list[int], max_length: int, before: list[int], after: list[int]) -> list[list[int]]:
    size = max_length - len(before) - len(after)
    if size < 1:
        raise ValueError(f"max_length={max_length} leaves no room beside the tokenizer's own tokens: raise it.")
    parts = [tokens[start : start + size] for start in range(0, len(tokens), size)]
    # A single token that is left over has nothing to predict.
    return [[*before, *part, *after] for number, part in enumerate(parts) if number == 0 or len(part) > 1]


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return what a tokenizer puts before and behind a text."""
    whole, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if bare and whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return [], []
