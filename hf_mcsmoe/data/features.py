"""Rows of a task, or texts, as tokens to train on and to measure a loss on.

A feature is one row: `input_ids`, `attention_mask` and `labels`, lists of token ids; a label of -100 does not count.
"""

import copy
import random
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from hf_mcsmoe.data.choices import CHOICES, choice_pairs
from hf_mcsmoe.data.spans import MEAN_SPAN, NOISE_DENSITY, corrupt_spans, sentinel_token_ids
from hf_mcsmoe.data.tasks import Row, Task
from hf_mcsmoe.data.text import Sample

Feature = dict[str, list[int]]
Pair = tuple[str, str]
# Between texts that are read as one.
SEPARATOR = "\n\n"


def task_features(
    task: Task,
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    encoder_decoder: bool,
    max_length: int | None = None,
) -> list[Feature]:
    """Return the rows of a task as `evaluation` poses them: the source, or the context of a choice, and the answer.

    Args:
        max_length: of the source, in tokens; of both texts where they are one, for a model without an encoder. By
            default the task's.

    Raises:
        ValueError: a row that does not fit the task.
    """
    examples, length = task.examples(list(rows)), max_length or task.max_source_length
    if encoder_decoder:
        pairs = [(example.source, example.targets[0]) for example in examples]
        return pair_features(pairs, tokenizer, length, task.max_target_length)
    if task.name in CHOICES:
        choices = [CHOICES[task.name](row) for row in rows]
        return continuation_features([choice_pairs(choice)[choice[2]] for choice in choices], tokenizer, length)
    return continuation_features([(item.source, f" {item.targets[0]}") for item in examples], tokenizer, length)


def text_features(
    samples: Sequence[Sample],
    tokenizer: PreTrainedTokenizerBase,
    *,
    encoder_decoder: bool,
    max_length: int,
    seed: int = 0,
    fixed_spans: bool = False,
) -> list[Feature]:
    """Return texts, or texts and their targets, as features.

    Texts without targets are read as one and cut into blocks of `max_length` tokens, in which spans are masked for an
    encoder-decoder, the same ones for the same `seed`; with `fixed_spans` all of equal length.

    Raises:
        ValueError: texts without targets for an encoder-decoder whose tokenizer has no sentinels to mask spans by.
    """
    targets = [target for _, target in samples if target is not None]
    texts = [text for text, _ in samples]
    if targets:
        if encoder_decoder:
            return pair_features(list(zip(texts, targets, strict=True)), tokenizer, max_length, max_length)
        pairs = [(text, f" {target}") for text, target in zip(texts, targets, strict=True)]
        return continuation_features(pairs, tokenizer, max_length)
    if not encoder_decoder:
        return block_features(texts, tokenizer, max_length)
    if not sentinel_token_ids(tokenizer):
        raise ValueError(
            "The tokenizer has no tokens like <extra_id_0> to mask spans of text by, and an encoder-decoder needs "
            "targets: name the column that holds them (--target-column)."
        )
    return denoising_features(texts, tokenizer, max_length, seed, fixed_spans)


def pair_features(
    pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, max_source_length: int, max_target_length: int
) -> list[Feature]:
    """Return sources and targets for an encoder-decoder."""
    if not pairs:
        return []
    sources = tokenizer([source for source, _ in pairs], truncation=True, max_length=max_source_length)
    targets = [target for _, target in pairs]
    labels = tokenizer(text_target=targets, truncation=True, max_length=max_target_length)["input_ids"]
    columns = zip(sources["input_ids"], sources["attention_mask"], labels, strict=True)
    return [{"input_ids": ids, "attention_mask": mask, "labels": label} for ids, mask, label in columns]


def continuation_features(pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Feature]:
    """Return contexts with the texts that follow them, of which alone the tokens count, and the end of the text."""
    features = []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for context, answer in pairs:
        tokens, labels = append_pair(tokenizer, context, answer, max_length - len(end))
        tokens, labels = [*tokens, *end], [*labels, *end]
        features.append({"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels})
    return features


def block_features(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Feature]:
    """Return texts as one, cut into blocks of `max_length` tokens, each behind the token that begins a text, if any.

    What is left at the end is a shorter block, unless it has nothing to predict.
    """
    # Asked of the tokenizer itself: one may have such a token and not put it before a text.
    begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    start = [tokenizer.bos_token_id] if begins else []
    blocks = [[*start, *block] for block in _blocks(texts, tokenizer, max_length - len(start))]
    return [
        {"input_ids": block, "attention_mask": [1] * len(block), "labels": block} for block in blocks if len(block) > 1
    ]


def denoising_features(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int, seed: int, fixed_spans: bool = False
) -> list[Feature]:
    """Return texts as one, cut into blocks of `max_length` tokens, with masked spans, as T5 is trained."""
    features, end = [], [tokenizer.eos_token_id]
    noise: dict[str, Any] = {"noise_density": NOISE_DENSITY, "mean_span": MEAN_SPAN, "fixed_spans": fixed_spans}
    sentinels = sentinel_token_ids(tokenizer)
    for number, block in enumerate(_blocks(texts, tokenizer, max_length)):
        rng = random.Random(f"{seed}:{number}")
        source, target = corrupt_spans(block, sentinels, **noise, rng=rng)
        if target:
            tokens = source + end
            features.append({"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": target + end})
    return features


def _blocks(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, size: int) -> list[list[int]]:
    tokens = tokenizer(SEPARATOR.join(texts), add_special_tokens=False)["input_ids"]
    return [tokens[start : start + size] for start in range(0, len(tokens), size)]


def with_padding(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return a copy of a tokenizer that pads on the right, with the end of the text where it has no other token."""
    made = copy.deepcopy(tokenizer)
    made.padding_side = "right"
    if made.pad_token is None:
        made.pad_token = made.eos_token
    return made


def collator(tokenizer: PreTrainedTokenizerBase) -> DataCollatorForSeq2Seq:
    """Return what joins features to a padded batch [batch, length], for either kind of model."""
    return DataCollatorForSeq2Seq(with_padding(tokenizer))


def feature_batches(
    features: Sequence[Feature], tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> list[dict[str, torch.Tensor]]:
    """Return all features in padded batches; those of like length share one."""
    join: Any = collator(tokenizer)
    ordered = sorted(features, key=lambda feature: len(feature["input_ids"]))
    return [dict(join(ordered[start : start + batch_size])) for start in range(0, len(ordered), batch_size)]


def append_pair(
    tokenizer: PreTrainedTokenizerBase, context: str, answer: str, max_length: int | None
) -> tuple[list[int], list[int]]:
    """Return the tokens of both texts in a row and, per token, itself as label or -100 where it is context."""
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    # White space at the seam belongs to the answer: tokens hold the space before a word.
    stripped = context.rstrip()
    answer = context[len(stripped) :] + answer
    before = tokenizer(stripped, add_special_tokens=False)["input_ids"]
    both = tokenizer(stripped + answer, add_special_tokens=False)["input_ids"]
    length = len(both) - len(before)
    if length <= 0:
        raise ValueError(f"The answer {answer!r} adds no token to its context.")
    tokens = [*start, *both] if start or before else [tokenizer.eos_token_id, *both]
    tokens = tokens[-max_length:] if max_length else tokens
    length = min(length, len(tokens) - 1)
    return tokens, [-100] * (len(tokens) - length) + tokens[len(tokens) - length :]
