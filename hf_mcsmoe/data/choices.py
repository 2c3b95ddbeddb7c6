"""Multiple choice for models that continue text: a context, the texts that may follow it, and the right one.

Texts are those that language models are evaluated on elsewhere (lm-evaluation-harness), so that figures compare.
"""

import re
from collections.abc import Callable, Sequence

from hf_mcsmoe.data.text import Row

# A context, or one per choice; the texts that may follow, each beginning with a space where one is due; the index of
# the right one.
Choice = tuple[str | Sequence[str], Sequence[str], int]


def choice_pairs(choice: Choice) -> list[tuple[str, str]]:
    """Return the pairs of context and text whose likelihoods are compared."""
    contexts, texts, _ = choice
    contexts = [contexts] * len(texts) if isinstance(contexts, str) else contexts
    return list(zip(contexts, texts, strict=True))


def _copa(row: Row) -> Choice:
    """The premise without its full stop, joined to cause or effect by a word (Roemmele et al. 2011)."""
    word = {"cause": "because", "effect": "therefore"}[row["question"]]
    choices = [row["choice1"], row["choice2"]]
    return (
        f"{row['premise'].strip().rstrip('.')} {word}",
        [f" {text[:1].lower()}{text[1:]}" for text in choices],
        int(row["label"]),
    )


def _plain(text: str) -> str:
    """Return a text of HellaSwag without the marks that its WikiHow part holds."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _hellaswag(row: Row) -> Choice:
    # Rows without the two parts of the context have it whole.
    context = f"{row['ctx_a']} {row['ctx_b'].capitalize()}" if "ctx_a" in row else row["ctx"]
    heading = f"{row['activity_label']}: " if "activity_label" in row else ""
    return _plain(heading + context), [f" {_plain(ending)}" for ending in row["endings"]], int(row["label"])


def _openbookqa(row: Row) -> Choice:
    choices = row["choices"]
    return (
        row["question_stem"],
        [f" {text}" for text in choices["text"]],
        choices["label"].index(row["answerKey"].strip()),
    )


def _winogrande(row: Row) -> Choice:
    """The sentence up to each option, and what is the same behind it (partial evaluation, Trinh & Le 2018)."""
    before, _, after = row["sentence"].partition("_")
    contexts = [before + row[option] for option in ("option1", "option2")]
    return contexts, [f" {after.strip()}"] * 2, int(row["answer"]) - 1


# Per name of a task; a model with an encoder gets these tasks as text to text instead.
CHOICES: dict[str, Callable[[Row], Choice]] = {
    "copa": _copa,
    "hellaswag": _hellaswag,
    "openbookqa": _openbookqa,
    "winogrande": _winogrande,
}
