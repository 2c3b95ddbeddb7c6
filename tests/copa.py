"""A tiny Switch that knows the words of COPA, and rows of it whose answers can be learnt."""

import json
from pathlib import Path
from typing import Any

from families import build
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = ["<pad>", "</s>", "<unk>", "choice1", "choice2", "copa", "choice1:", "choice2:", "premise:", "question:"]
LETTERS = [f"letter{number}" for number in range(20)]


def rows(number: int, shift: int = 0) -> list[dict]:
    """Make rows of COPA in which the first of two words tells the answer."""
    return [
        {
            "premise": LETTERS[(index + shift) % 20],
            "question": "cause" if index % 2 else "effect",
            "choice1": "x",
            "choice2": "y",
            "label": index % 2,
        }
        for index in range(number)
    ]


def write_model(path: Path, **settings: Any) -> None:
    """Write a tiny Switch with its tokenizer; `settings` are of its configuration."""
    words = {word: index for index, word in enumerate([*WORDS, "cause", "effect", "x", "y", *LETTERS])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    model = build("switch_transformers")
    model.config.eos_token_id = model.generation_config.eos_token_id = 1
    model.config.update(settings)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def write_folder(path: Path) -> Path:
    """Write a tiny Switch with its tokenizer, and files to train and evaluate on."""
    write_model(path / "model")
    for name, made in (("train", rows(40)), ("evaluation", rows(11, shift=4))):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return path
