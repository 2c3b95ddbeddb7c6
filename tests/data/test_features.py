"""Rows and texts as tokens to train on: what counts as a label, blocks, masked spans."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hf_mcsmoe.data.features import feature_batches, task_features, text_features
from hf_mcsmoe.data.tasks import TASKS

WORDS = ["<pad>", "</s>", "<s>", "<unk>", *"abcdefghij", "True", "False", *(f"<extra_id_{n}>" for n in range(9))]


def tokenizer(template: str = "$A", *, padding: bool = True) -> PreTrainedTokenizerFast:
    """Make a tokenizer of whole words that adds what the template says."""
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("</s>", 1), ("<s>", 2)])
    special = {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    special |= {"pad_token": "<pad>"} if padding else {}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


@pytest.mark.parametrize(
    ("template", "blocks"), [("$A", ["a b c", "d e f"]), ("<s> $A", ["<s> a b", "<s> c d", "<s> e f", "<s> g"])]
)
def test_texts_are_read_as_one_and_cut_into_blocks_whose_tokens_all_count(template: str, blocks: list[str]) -> None:
    samples = [("a b", None), ("c d e f", None), ("g", None)]
    found = text_features(samples, tokenizer(template), encoder_decoder=False, max_length=3)
    assert [feature["input_ids"] for feature in found] == list(map(ids, blocks))
    assert all(feature["labels"] == feature["input_ids"] for feature in found)


def test_masked_spans_give_back_the_blocks_they_were_taken_from() -> None:
    samples = [("a b c d e f g h i j", None), ("j i h g f e d c b a", None)]
    words, sentinels = tokenizer("$A </s>"), set(ids(" ".join(WORDS[-9:])))
    found = text_features(samples, words, encoder_decoder=True, max_length=10, seed=1)
    restored = []
    for feature in found:
        assert feature["input_ids"][-1] == feature["labels"][-1] == 1
        spans: dict[int, list[int]] = {}
        for token in feature["labels"][:-1]:
            if token in sentinels:
                spans[token] = []
            else:
                spans[list(spans)[-1]].append(token)
        assert any(spans.values())
        restored += [part for token in feature["input_ids"][:-1] for part in spans.get(token, [token])]
    assert restored == ids("a b c d e f g h i j j i h g f e d c b a")
    assert found == text_features(samples, words, encoder_decoder=True, max_length=10, seed=1)
    assert found != text_features(samples, words, encoder_decoder=True, max_length=10, seed=2)


def test_of_a_text_and_its_target_only_the_target_counts() -> None:
    samples = [("a b", "c"), ("d", "e f")]
    found = text_features(samples, tokenizer("<s> $A"), encoder_decoder=False, max_length=9)
    assert [feature["input_ids"] for feature in found] == [ids("<s> a b c </s>"), ids("<s> d e f </s>")]
    assert [feature["labels"] for feature in found] == [[-100] * 3 + ids("c </s>"), [-100] * 2 + ids("e f </s>")]
    found = text_features(samples, tokenizer("$A </s>"), encoder_decoder=True, max_length=9)
    assert [(feature["input_ids"], feature["labels"]) for feature in found] == [
        (ids("a b </s>"), ids("c </s>")),
        (ids("d </s>"), ids("e f </s>")),
    ]


def test_a_task_is_trained_on_as_it_is_evaluated() -> None:
    row = {"question": "a", "passage": "b", "label": 1}
    (found,) = task_features(TASKS["boolq"], [row], tokenizer("$A </s>"), encoder_decoder=True)
    assert found["labels"] == ids("True </s>")
    (found,) = task_features(TASKS["boolq"], [row], tokenizer(), encoder_decoder=False)
    assert [label for label in found["labels"] if label != -100] == ids("True </s>")
    row = {"premise": "a b.", "choice1": "c d", "choice2": "e f", "question": "cause", "label": 1}
    (found,) = task_features(TASKS["copa"], [row], tokenizer(), encoder_decoder=False)
    assert [label for label in found["labels"] if label != -100] == ids("e f </s>"), "the right choice follows"


def test_batches_hold_every_row_once_and_padding_does_not_count() -> None:
    words = tokenizer(padding=False)
    samples = [("a", "b"), ("a b c d", "e"), ("a b", "c")]
    features = text_features(samples, words, encoder_decoder=False, max_length=9)
    batches = feature_batches(features, words, 2)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 5), (1, 7)]
    for batch in batches:
        assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    rows = [row[mask == 1].tolist() for batch in batches for row, mask in zip(*_columns(batch), strict=True)]
    assert sorted(rows) == sorted(feature["input_ids"] for feature in features)
    assert words.pad_token is None, "the tokenizer given is left as it was"


def _columns(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return batch["input_ids"], batch["attention_mask"]


def test_an_encoder_decoder_without_sentinels_needs_targets() -> None:
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(ValueError, match=r"no tokens like <extra_id_0>.*--target-column"):
        text_features([("a", None)], words, encoder_decoder=True, max_length=4)
