"""The one way from samples of text and rows of a task to batches: features, which the collator joins.

A feature is one row: `input_ids`, `attention_mask` and, where something is to be predicted, `labels`: lists of token
ids; a label of -100 does not count. `domain` may hold the number of the data set that the row is of.
"""

import copy
import random
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, cast

import torch
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, PreTrainedTokenizerBase

from hf_mcsmoe.data.chat import written
from hf_mcsmoe.data.choices import CHOICES, choice_pairs
from hf_mcsmoe.data.domains import DOMAIN, DomainBatch
from hf_mcsmoe.data.spans import SpanNoise, corrupt_spans, sentinel_token_ids
from hf_mcsmoe.data.tasks import Task
from hf_mcsmoe.data.text import Row, Sample

Feature = dict[str, list[int]]
Pair = tuple[str, str]
# Of so many calibration rows one is held out of every fit.
HELD_OUT = 8
# Between texts that are read as one.
SEPARATOR = "\n\n"
T5_NOISE = SpanNoise()


def split_held_out(features: Sequence[Feature]) -> tuple[list[Feature], list[Feature]]:
    """Return rows to fit to, and those held out to judge: an eighth, spread evenly; none of fewer than eight rows."""
    held_out = features[HELD_OUT - 1 :: HELD_OUT]
    return [row for place, row in enumerate(features, start=1) if place % HELD_OUT], list(held_out)


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
        return pair_features([item.pair for item in examples], tokenizer, length, task.max_target_length)
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
    noise: SpanNoise = T5_NOISE,
) -> list[Feature]:
    """Return texts, or texts and their targets, as features to train on and to measure a loss on.

    Conversations are texts as the tokenizer's chat template writes them.

    Texts without targets are read as one and cut into blocks of `max_length` tokens, in which spans are masked for an
    encoder-decoder, the same ones for the same `seed`.

    Raises:
        ValueError: texts without targets for an encoder-decoder whose tokenizer has no sentinels to mask spans by;
            conversations for a tokenizer without a chat template.
    """
    targets = [target for _, target in samples if target is not None]
    texts = [written(text, tokenizer) for text, _ in samples]
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
    blocks = [block for block in _blocks(texts, tokenizer, max_length) if len(block) > 1]
    return span_features(blocks, [f"{seed}:{number}" for number in range(len(blocks))], tokenizer, noise)


def input_features(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> list[Feature]:
    """Return texts without labels, each cut to `max_length` tokens."""
    if not texts:
        return []
    encoded = tokenizer(list(texts), truncation=max_length is not None, max_length=max_length, verbose=False)
    columns = zip(encoded["input_ids"], encoded["attention_mask"], strict=True)
    return [{"input_ids": tokens, "attention_mask": mask} for tokens, mask in columns]


def pair_features(
    pairs: Sequence[Pair],
    tokenizer: PreTrainedTokenizerBase,
    max_source_length: int | None = None,
    max_target_length: int | None = None,
) -> list[Feature]:
    """Return sources and targets for an encoder-decoder, each cut to its length in tokens."""
    if not pairs:
        return []
    features = input_features([source for source, _ in pairs], tokenizer, max_source_length)
    targets = [target for _, target in pairs]
    cut = max_target_length is not None
    labels = tokenizer(text_target=targets, truncation=cut, max_length=max_target_length)["input_ids"]
    return [{**feature, "labels": label} for feature, label in zip(features, labels, strict=True)]


def continuation_features(pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Feature]:
    """Return contexts with the texts that follow them, of which alone the tokens count, and the end of the text."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    features = [answer_feature(context, answer, tokenizer, max_length - len(end)) for context, answer in pairs]
    return [_feature(feature["input_ids"] + end, feature["labels"] + end) for feature in features]


def answer_feature(
    context: str, answer: str, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> Feature:
    """Return both texts in a row, for a model without an encoder; of the labels only the answer's count.

    A row longer than `max_length` tokens loses its beginning.

    Raises:
        ValueError: an answer of no token.
    """
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
    return _feature(tokens, [-100] * (len(tokens) - length) + tokens[len(tokens) - length :])


def block_features(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Feature]:
    """Return texts as one, cut into blocks of `max_length` tokens, each behind the token that begins a text, if any.

    What is left at the end is a shorter block, unless it has nothing to predict.
    """
    # Asked of the tokenizer itself: one may have such a token and not put it before a text.
    begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    start = [tokenizer.bos_token_id] if begins else []
    blocks = [[*start, *block] for block in _blocks(texts, tokenizer, max_length - len(start))]
    return [_feature(block, block) for block in blocks if len(block) > 1]


def span_features(
    rows: Sequence[list[int]], seeds: Sequence[str], tokenizer: PreTrainedTokenizerBase, noise: SpanNoise
) -> list[Feature]:
    """Return rows of tokens with masked spans for an encoder-decoder; each row's spans are drawn by its own seed."""
    sentinels, end = sentinel_token_ids(tokenizer), [tokenizer.eos_token_id]
    features = []
    for tokens, seed in zip(rows, seeds, strict=True):
        source, target = corrupt_spans(tokens, sentinels, **asdict(noise), rng=random.Random(seed))
        features.append(_feature(source + end, target + end))
    return features


def _feature(tokens: list[int], labels: list[int]) -> Feature:
    return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels}


def _blocks(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, size: int) -> list[list[int]]:
    tokens = tokenizer(SEPARATOR.join(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return [tokens[start : start + size] for start in range(0, len(tokens), size)]


def with_padding(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return a copy of a tokenizer that pads on the right.

    Where it has no token to pad with, it takes the end of the text, else the first of its vocabulary: what stands
    behind the mask does not count.
    """
    made = copy.deepcopy(tokenizer)
    made.padding_side = "right"
    if made.pad_token is None:
        made.pad_token = made.eos_token or cast(str, made.convert_ids_to_tokens(0))
    return made


def collator(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | None = None) -> DataCollatorForSeq2Seq:
    """Return what joins features to a padded batch [batch, length], for either kind of model.

    Args:
        model: an encoder-decoder whose decoder's inputs go into the batch, where its loss is not computed in it.
    """
    return DataCollatorForSeq2Seq(with_padding(tokenizer), model=model)


def feature_batches(
    features: Sequence[Feature], tokenizer: PreTrainedTokenizerBase, batch_size: int, *, by_length: bool = True
) -> list[dict[str, torch.Tensor]]:
    """Return all features in padded batches; those of like length share one, or all keep their order.

    Where features tell the number of their data set (`DOMAIN`), the batches know it, see `DomainBatch`.
    """
    join: Any = collator(tokenizer)
    ordered = sorted(features, key=lambda feature: len(feature["input_ids"])) if by_length else features
    parts = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
    return [_joined(part, join) for part in parts]


def _joined(features: Sequence[Feature], join: Any) -> dict[str, torch.Tensor]:
    rows = [{name: value for name, value in feature.items() if name != DOMAIN} for feature in features]
    # The collator puts None for labels that no feature has.
    batch = {name: value for name, value in join(rows).items() if value is not None}
    if not all(DOMAIN in feature for feature in features):
        return batch
    return DomainBatch(batch, torch.tensor([feature[DOMAIN][0] for feature in features]))
