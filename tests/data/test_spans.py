"""Span corruption: what is taken out can be put back, in the stated amount, the same in every run."""

import itertools
import random

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_mcsmoe.data.calibration import sample_features
from hf_mcsmoe.data.features import feature_batches
from hf_mcsmoe.data.spans import corrupt_spans, sentinel_token_ids

SENTINELS = list(range(1000, 1032))


def restore(source: list[int], target: list[int]) -> list[int]:
    """Put every span of the target back in the place of its sentinel."""
    spans: dict[int, list[int]] = {}
    for token in target:
        if token in SENTINELS:
            spans[(last := token)] = []
        else:
            spans[last].append(token)
    return [item for token in source for item in spans.get(token, [token])]


@pytest.mark.parametrize("length", [2, 3, 10, 57, 200, 512])
@pytest.mark.parametrize("density", [0.15, 0.5])
def test_spans_can_be_put_back_and_have_the_stated_number_and_length(length: int, density: float) -> None:
    tokens = list(range(length))
    for seed in range(20):
        source, target = corrupt_spans(
            tokens, SENTINELS, noise_density=density, mean_span=3.0, rng=random.Random(seed)
        )
        assert restore(source, target) == tokens
        spans = [token for token in target if token in SENTINELS]
        assert spans == SENTINELS[: len(spans)] == [token for token in source if token in SENTINELS]
        masked = min(max(round(length * density), 1), length - 1)
        assert len(target) - len(spans) == masked
        assert len(spans) == min(max(round(masked / 3), 1), len(SENTINELS), length - masked + 1)


def span_lengths(target: list[int]) -> list[int]:
    """Return the lengths of a target's spans."""
    starts = [place for place, token in enumerate(target) if token in SENTINELS] + [len(target)]
    return [end - start - 1 for start, end in itertools.pairwise(starts)]


@pytest.mark.parametrize("span", [2, 3, 5])
@pytest.mark.parametrize("length", [40, 96, 200])
def test_spans_of_fixed_length(span: int, length: int) -> None:
    tokens = list(range(length))
    for seed in range(20):
        source, target = corrupt_spans(
            tokens, SENTINELS, noise_density=0.15, mean_span=span, rng=random.Random(seed), fixed_spans=True
        )
        assert restore(source, target) == tokens
        assert span_lengths(target) == [span] * max(round(round(0.15 * length) / span), 1)
    source, target = corrupt_spans(
        tokens[:3], SENTINELS, noise_density=0.15, mean_span=span, rng=random.Random(0), fixed_spans=True
    )
    assert restore(source, target) == tokens[:3]
    assert span_lengths(target) == [2]


def test_generators_of_python_and_numpy_are_both_taken() -> None:
    for rng in (random.Random(0), np.random.default_rng(0)):
        source, target = corrupt_spans(list(range(40)), SENTINELS, noise_density=0.15, mean_span=3.0, rng=rng)
        assert restore(source, target) == list(range(40))


def test_a_texts_spans_do_not_depend_on_the_texts_beside_it_nor_on_the_batch_size() -> None:
    words = ["<pad>", "</s>", "<unk>", *(f"<extra_id_{n}>" for n in range(8)), *map(str, range(100))]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    assert sentinel_token_ids(tokenizer) == list(range(3, 11))
    rng = random.Random(0)
    texts = [" ".join(str(rng.randrange(100)) for _ in range(rng.randint(5, 40))) for _ in range(7)]
    samples = [(text, None) for text in texts]
    features = sample_features(samples, tokenizer, encoder_decoder=True, max_length=32)
    assert features[3:5] == sample_features(samples[3:5], tokenizer, encoder_decoder=True, max_length=32)
    assert features != sample_features(samples, tokenizer, encoder_decoder=True, max_length=32, seed=1)
    for size in (1, 3, 7):
        batches = feature_batches(features, tokenizer, size, by_length=False)
        assert [len(batch["labels"]) for batch in batches] == [size] * (7 // size) + [7 % size] * (7 % size > 0)
        rows = [[token for token in row.tolist() if token != -100] for b in batches for row in b["labels"]]
        assert rows == [feature["labels"] for feature in features]
        for batch in batches:
            assert ((batch["input_ids"] == 0) == (batch["attention_mask"] == 0)).all()
