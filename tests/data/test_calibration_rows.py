"""What is drawn of calibration data: windows of long texts, conversations as templates write them, shares."""

from typing import Any

import pytest
from families import build
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hf_mcsmoe.cli.shares import counts_of, parsed
from hf_mcsmoe.data.calibration import calibration_batches, draw
from hf_mcsmoe.data.chat import Chat
from hf_mcsmoe.data.features import text_features

NUMBERS = [str(number) for number in range(40)]
WORDS = ["<pad>", "</s>", "<s>", "<unk>", "user", "assistant", *(f"<extra_id_{n}>" for n in range(9)), *NUMBERS]
TEMPLATE = "<s> {% for message in messages %}{{ message.role }} {{ message.content }} {% endfor %}"
OPTIONS: dict[str, Any] = {"encoder_decoder": False, "num_samples": 9, "max_length": 6}


@pytest.fixture
def words() -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words that puts a beginning and an end around a text."""
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [("</s>", 1), ("<s>", 2)]
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    names = {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)


def texts(features: list[dict[str, list[int]]]) -> list[str]:
    return [" ".join(WORDS[token] for token in feature["input_ids"]) for feature in features]


def test_a_long_text_is_cut_into_windows_that_hold_all_of_it(words: PreTrainedTokenizerFast) -> None:
    drawn = draw([(" ".join(NUMBERS), None)], words, **OPTIONS | {"num_samples": 99})
    found = texts(drawn.features)
    assert all(text.startswith("<s> ") and text.endswith(" </s>") for text in found)
    assert sorted(" ".join(found).replace("<s>", "").replace("</s>", "").split()) == sorted(NUMBERS)
    assert [len(feature["input_ids"]) for feature in drawn.features] == [6] * 10
    told = "10 samples: 60 of 60 tokens, 1 of 1 rows; 99 samples were asked for, and the data hold no more"
    assert str(drawn) == told
    starts = [int(text.split()[1]) for text in found]
    assert starts != sorted(starts), "drawn at random"


def test_the_first_window_of_each_text_comes_before_the_others_of_any(words: PreTrainedTokenizerFast) -> None:
    samples = [(" ".join([first, *NUMBERS]), None) for first in ("user", "assistant")]
    for number in (1, 2, 5):
        found = texts(draw(samples, words, **OPTIONS | {"num_samples": number}).features)
        assert len({*found}) == len(found) == number
        assert sum(text.split()[1] in ("user", "assistant") for text in found) == min(number, 2)


def test_of_many_rows_only_those_drawn_are_turned_into_tokens(
    words: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    call = PreTrainedTokenizerFast.__call__

    def counted(self: Any, text: Any = None, *arguments: Any, **options: Any) -> Any:
        seen.extend(text if isinstance(text, list) else [])
        return call(self, text, *arguments, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", counted)
    samples = [(f"{number % 40} 1 2", None) for number in range(100_000)]
    drawn = draw(samples, words, **OPTIONS)
    assert len(seen) == len(drawn.features) == 9
    assert str(drawn).startswith("9 samples: 45 of about ")
    assert 450_000 < drawn.tokens_there < 550_000
    assert str(drawn).endswith(" tokens, 9 of 100,000 rows")


def test_conversations_are_what_the_template_makes_of_them(words: PreTrainedTokenizerFast) -> None:
    chat = Chat(({"role": "user", "content": "1 2"}, {"role": "assistant", "content": "3"}))
    for encoder_decoder in (False, True):
        with pytest.raises(ValueError, match=r"no chat template .*--tokenizer"):
            draw([(chat, None)], words, **OPTIONS | {"encoder_decoder": encoder_decoder})
    with pytest.raises(ValueError, match="no chat template"):
        text_features([(chat, None)], words, encoder_decoder=False, max_length=9)
    words.chat_template = TEMPLATE
    assert texts(draw([(chat, None)], words, **OPTIONS).features) == ["<s> user 1 2 assistant 3"], "one beginning"
    (feature,) = text_features([(chat, None)], words, encoder_decoder=False, max_length=9)
    assert texts([feature])[0].endswith("user 1 2 assistant 3")
    words.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match=r"template refuses a conversation .roles must alternate"):
        draw([(chat, None)], words, **OPTIONS)


def test_long_texts_of_an_encoder_decoder_are_masked_window_by_window(words: PreTrainedTokenizerFast) -> None:
    samples = [(" ".join(NUMBERS), None)]
    drawn = draw(samples, words, **OPTIONS | {"encoder_decoder": True, "max_length": 10})
    assert len(drawn.features) == 4
    seen = [token for feature in drawn.features for token in feature["input_ids"] + feature["labels"]]
    assert {WORDS[token] for token in seen} >= {*NUMBERS}
    pair = draw([("1 2 3 4 5 6 7", "8")], words, **OPTIONS | {"encoder_decoder": True})
    assert texts(pair.features) == ["<s> 1 2 3 4 </s>"], "the rest of a source is not the target's"
    assert (pair.tokens, pair.tokens_there) == (6, 9)


def test_too_short_a_length_and_texts_of_no_token_are_refused(words: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="max_length=2 leaves no room"):
        draw([("1", None)], words, **OPTIONS | {"max_length": 2})
    with pytest.raises(ValueError, match="hold no token"):
        draw([("", None)], words, **OPTIONS)
    model = build("mixtral")
    assert len(calibration_batches([(" ".join(NUMBERS), None)], words, model, max_length=12)) == 1


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (["a.txt"], [("a.txt", None)]),
        (["a.txt:0.3", "b.txt"], [("a.txt", 0.3), ("b.txt", None)]),
        (["user/set:config"], [("user/set:config", None)]),
        (["user/set:config:0.25"], [("user/set:config", 0.25)]),
        (["user/set:2024"], [("user/set:2024", None)]),
        (["a.txt:1"], [("a.txt", 1.0)]),
        (["c:0.5"], [("c:0.5", None)]),
        (["c:0.5:0.5"], [("c:0.5", 0.5)]),
    ],
)
def test_a_share_stands_behind_a_name(
    data: list[str], expected: list[Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt", "c:0.5"):
        (tmp_path / name).write_text("text")
    assert parsed(data) == expected


@pytest.mark.parametrize("data", ["a.txt:0", "a.txt:-1", "a.txt:nan", "a.txt:2", "a.txt:half"])
def test_what_is_no_share_is_refused(data: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match="is no share of the samples"):
        parsed([data])
    with pytest.raises(ValueError, match="leave nothing for the data without one"):
        parsed(["a.txt:1", "a.txt"])


@pytest.mark.parametrize(
    ("shares", "number", "counts"),
    [
        ([0.3, None], 10, [3, 7]),
        ([0.3, 0.3], 10, [5, 5]),
        ([0.2, None, None], 10, [2, 4, 4]),
        ([1 / 3, 1 / 3, 1 / 3], 10, [3, 4, 3]),
        ([0.999, None], 10, [10, 0]),
    ],
)
def test_shares_add_up_to_the_number(shares: list[float | None], number: int, counts: list[int]) -> None:
    assert counts_of(shares, number) == counts
