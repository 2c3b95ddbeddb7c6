"""Teachers of other tokens are refused."""

from pathlib import Path
from typing import Any

import pytest
from distilled import make_student, make_trainer
from families import build
from merged import example, tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase


def _other_tokenizer() -> PreTrainedTokenizerBase:
    """Return a tokenizer of the same size with two words exchanged."""
    changed = tokenizer()
    state = changed.backend_tokenizer.to_str().replace('"w5":5', '"x":5').replace('"w6":6', '"w5":6')
    return type(changed)(tokenizer_object=type(changed.backend_tokenizer).from_str(state.replace('"x":5', '"w6":5')))


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """Save the original model with a tokenizer."""
    example("mixtral").base.save_pretrained(tmp_path / "teacher")
    tokenizer().save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


@pytest.mark.parametrize("beside", [False, True])
def test_a_teacher_with_another_tokenizer_is_refused(beside: bool, teacher: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"processing_class": _other_tokenizer()}
    if beside:
        make_student("mixtral").save_pretrained(tmp_path / "student")
        _other_tokenizer().save_pretrained(tmp_path / "student")
        student = type(make_student("mixtral")).from_pretrained(tmp_path / "student")
        given = {"model": student}
    with pytest.raises(ValueError, match=r"2 tokens differ; 5 is 'w6' for the student and 'w5' for the teacher"):
        make_trainer("mixtral", tmp_path / "run", teacher=str(teacher), **given)


def test_a_teacher_with_the_same_tokenizer_or_none_is_taken(teacher: Path, tmp_path: Path) -> None:
    make_trainer("mixtral", tmp_path, teacher=str(teacher), processing_class=AutoTokenizer.from_pretrained(teacher))
    make_trainer("mixtral", tmp_path, teacher=str(teacher))
    grown = tokenizer()
    grown.add_tokens(["<new>"])
    make_trainer("mixtral", tmp_path, teacher=str(teacher), processing_class=grown)
    make_trainer("mixtral", tmp_path, teacher=build("mixtral"), processing_class=_other_tokenizer())
