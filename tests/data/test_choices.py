"""Multiple choice as language models are evaluated on it elsewhere."""

from typing import Any

import pytest

from hf_mcsmoe.data.choices import CHOICES, choice_pairs
from hf_mcsmoe.data.tasks import TASKS

COPA = {"premise": "It rained.", "choice1": "We left.", "choice2": "The sun shone.", "question": "cause", "label": 1}
CASES: dict[str, tuple[dict[str, Any], list[tuple[str, str]], int]] = {
    "copa": (COPA, [("It rained because", " we left."), ("It rained because", " the sun shone.")], 1),
    "hellaswag": (
        {
            "activity_label": "Baking [title] cakes",
            "ctx_a": "A man bakes.",
            "ctx_b": "he",
            "ctx": "unused",
            "endings": ["eats [step] it.", "sleeps."],
            "label": "0",
        },
        [("Baking. cakes: A man bakes. He", " eats it."), ("Baking. cakes: A man bakes. He", " sleeps.")],
        0,
    ),
    "openbookqa": (
        {"question_stem": "Ice is", "choices": {"text": ["hot", "cold"], "label": ["A", "B"]}, "answerKey": "B"},
        [("Ice is", " hot"), ("Ice is", " cold")],
        1,
    ),
    "winogrande": (
        {"sentence": "Ann met Eve because _ was home.", "option1": "Ann", "option2": "Eve", "answer": "2"},
        [("Ann met Eve because Ann", " was home."), ("Ann met Eve because Eve", " was home.")],
        1,
    ),
}


def test_every_task_with_choices_is_a_task_and_has_a_case() -> None:
    assert CHOICES.keys() == CASES.keys()
    assert CHOICES.keys() <= TASKS.keys()


@pytest.mark.parametrize("name", CASES)
def test_a_row_becomes_contexts_and_what_may_follow(name: str) -> None:
    row, pairs, right = CASES[name]
    choice = CHOICES[name](row)
    assert choice_pairs(choice) == pairs
    assert choice[2] == right


def test_the_effect_follows_by_another_word_and_a_short_row_of_hellaswag_is_read_as_it_is() -> None:
    assert CHOICES["copa"]({**COPA, "question": "effect"})[0] == "It rained therefore"
    assert CHOICES["hellaswag"]({"ctx": "A man", "endings": ["a", "b"], "label": "1"}) == ("A man", [" a", " b"], 1)
