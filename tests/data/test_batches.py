"""What may be passed as batches: batches, texts and rows with a tokenizer; anything else is told what batches are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from families import build
from torch.utils.data import DataLoader, TensorDataset
from transformers import PreTrainedTokenizerFast

from hf_mcsmoe import LoSparseConfig, collect_statistics, compress, decompose_experts
from hf_mcsmoe.data.batches import as_batches
from hf_mcsmoe.evaluation.costs import account
from hf_mcsmoe.evaluation.quality import perplexity

TEXTS = ["what is 1 2 3", "it is 4", "what"]
BATCH = {"input_ids": torch.tensor([[3, 4, 5], [5, 4, 3]])}
MODEL = build("mixtral")
MADE: dict[str, Callable[[PreTrainedTokenizerFast], Any]] = {
    "texts": lambda tokenizer: TEXTS,
    "an iterator of texts": lambda tokenizer: iter(TEXTS),
    "rows of text": lambda tokenizer: Dataset.from_dict({"text": TEXTS}),
    "rows of tokens": lambda tokenizer: Dataset.from_dict({"input_ids": tokenizer(TEXTS)["input_ids"]}),
    "rows of tensors": lambda tokenizer: Dataset.from_dict(dict(tokenizer(TEXTS))).with_format("torch"),
}
WRONG: dict[str, tuple[Any, str]] = {
    "nothing": (None, "this is NoneType"),
    "a text": ("what is it", "this is str"),
    "a path": (Path("text.txt"), "this is PosixPath"),
    "a batch": (BATCH, "this is dict of 'input_ids': wrap a single batch in a list"),
    "a tensor": (BATCH["input_ids"], "this is Tensor"),
    "texts": (TEXTS, "its first item is str: .* calibration_batches"),
    "rows": ([{"text": "what"}], "its first item is dict of 'text'"),
    "splits": (DatasetDict({"train": Dataset.from_dict({"text": TEXTS})}), "this is DatasetDict of 'train'"),
    "untensored": ([{"input_ids": [[3, 4, 5]]}], "its first item is dict of 'input_ids'"),
    "tuples": (DataLoader(TensorDataset(BATCH["input_ids"])), "its first item is (list|tuple)"),
    "tensors": ([BATCH["input_ids"]], "its first item is Tensor"),
    "a number": (3, "this is int"),
}


@pytest.mark.parametrize("kind", MADE)
def test_texts_and_rows_become_batches_that_hold_all_of_them(kind: str, tokenizer: PreTrainedTokenizerFast) -> None:
    found = collect_statistics(MODEL, MADE[kind](tokenizer), tokenizer=tokenizer)
    expected = collect_statistics(
        MODEL, [{"input_ids": torch.tensor([tokenizer(text)["input_ids"]])} for text in TEXTS]
    )
    for name, sums in expected.layers.items():
        for statistic, value in sums.items():
            torch.testing.assert_close(found[name][statistic], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_no_batch_is_told_what_batches_are(wrong: str) -> None:
    given, message = WRONG[wrong]
    with pytest.raises(TypeError, match=f"batches must be .*, and {message}"):
        collect_statistics(MODEL, given)


def test_every_function_that_takes_batches_says_so() -> None:
    calls: list[Callable[[], Any]] = [
        lambda: compress(MODEL, TEXTS),
        lambda: perplexity(MODEL, TEXTS),
        lambda: account(MODEL, TEXTS[0]),
        lambda: decompose_experts(build("mixtral"), LoSparseConfig(rank=2), TEXTS),
    ]
    for call in calls:
        with pytest.raises(TypeError, match="batches must be a list"):
            call()


def test_batches_stay_as_they_are_and_nothing_is_read_twice(tokenizer: PreTrainedTokenizerFast) -> None:
    listed, read = [BATCH, BATCH], []
    assert as_batches(listed, MODEL, tokenizer) is listed
    stream = (read.append(number) or BATCH for number in range(3))
    found = as_batches(stream, MODEL)
    assert read == [0]
    assert [batch is BATCH for batch in found] == [True] * 3
    assert list(as_batches(iter(()), MODEL)) == []


def test_the_perplexity_of_texts_is_that_of_all_their_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("\n\n".join(TEXTS))["input_ids"]
    expected = perplexity(MODEL, [{"input_ids": torch.tensor([ids])}])
    assert perplexity(MODEL, TEXTS, tokenizer=tokenizer) == pytest.approx(expected)


def test_a_long_text_is_not_cut_off(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [int(batch["attention_mask"].sum()) for batch in as_batches(["what is it " * 400], MODEL, tokenizer)]
    assert sum(rows) == 1200
