"""The paper's tasks, and the others of its code, as text to text: a task is a row of `TASKS`.

Texts follow T5 (Raffel et al. 2020, appendix D) where T5 was trained on the task, and its pattern elsewhere.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from hf_mcsmoe.data.readers import load_rows
from hf_mcsmoe.data.text import Row
from hf_mcsmoe.methods.registry import unknown


@dataclass(frozen=True)
class Example:
    """A row as text: `targets` are all gold answers, of which the first is trained on.

    `label` is the index of the gold label or, in regression, its value; None where the answer is free text. Examples
    of one `group` are parts of one question or share a passage.
    """

    source: str
    targets: tuple[str, ...]
    label: int | float | None = None
    group: str | None = None

    @property
    def pair(self) -> tuple[str, str]:
        """The source and the target that is trained on."""
        return self.source, self.targets[0]


@dataclass(frozen=True)
class Task:
    """A task: where its rows are, how one becomes text, what is measured, and the paper's settings.

    `metrics` are names of `metrics.METRICS`; `labels` the answers of a classification, empty for free text. Lengths
    are in tokens; batch size and learning rate are the paper's for its eight tasks, else 32 and 5e-5.
    """

    name: str
    dataset: str
    config: str | None
    format: Callable[[Row], Example]
    metrics: tuple[str, ...]
    labels: tuple[str, ...] = ()
    train_split: str = "train"
    evaluation_split: str = "validation"
    batch_size: int = 32
    learning_rate: float = 5e-5
    max_source_length: int = 128
    max_target_length: int = 8

    def examples(self, rows: "list[Row] | list[dict[str, Any]]") -> list[Example]:
        """Return the rows as text.

        Raises:
            ValueError: a row lacks a column or has no gold label; the message shows the row.
        """
        made = []
        for number, row in enumerate(rows):
            try:
                made.append(self.format(row))
            except (KeyError, IndexError, TypeError, ValueError) as error:
                shown = str(dict(row))
                raise ValueError(
                    f"Row {number} does not fit task {self.name!r} ({type(error).__name__}: {error}): {shown[:200]}. "
                    f"Rows look like those of {self.dataset}, {self.config or 'its only configuration'}, and test "
                    "splits without labels cannot be used."
                ) from None
        return made


def task_rows(
    task: Task, split: str | None = None, *, data_dir: str | Path | None = None, limit: int | None = None
) -> list[dict[str, Any]]:
    """Return rows of a task's data set from the Hub or, laid out like the Hub, from `data_dir/<organisation>/<name>`.

    Args:
        split: by default the task's split for evaluation.
        data_dir: also a `.jsonl` or `.jsonl.gz` file of rows, which then is the split.
        limit: only the first rows.

    Raises:
        ValueError: no such folder, split or file; the message names what to pass.
    """
    split = split or task.evaluation_split
    try:
        if data_dir is None:
            rows = load_rows(task.dataset, task.config, split=split)
        elif Path(data_dir).is_file():
            rows = load_rows("json", data_files=str(data_dir), split="train", streaming=True)
        else:
            rows = load_rows(str(Path(data_dir) / task.dataset), task.config, split=split, streaming=True)
        return list(islice(rows, limit))
    except ValueError as error:
        raise ValueError(
            f"Task {task.name!r} has no split {split!r} here: {error} Another split is named with --split (in scripts "
            "--train_split, --evaluation_split), a file with --file (--train_file, --evaluation_file)."
        ) from None


def hold_out(examples: Sequence[Example], share: float) -> tuple[list[Example], list[Example]]:
    """Return the examples to train on, and a share of them held out; those of one group are on one side.

    Raises:
        ValueError: no share in [0, 1).
    """
    if not 0 <= share < 1:
        raise ValueError(f"A holdout of {share} is no share in [0, 1).")
    names = [item.group or str(number) for number, item in enumerate(examples)]
    groups = list(dict.fromkeys(names))
    apart = set(groups[: math.ceil(share * len(groups))])
    sides: tuple[list[Example], list[Example]] = ([], [])
    for name, item in zip(names, examples, strict=True):
        sides[name in apart].append(item)
    return sides


def get_task(name: str) -> Task:
    """Return a task by name, in whatever spelling: "SST-2" is "sst2".

    Raises:
        ValueError: there is none; the message names the nearest.
    """
    key = "".join(letter for letter in name.lower() if letter.isalnum())
    key = {"stsbenchmark": "stsb", "obqa": "openbookqa", "squadv1": "squad", "hotpot": "hotpotqa"}.get(key, key)
    if key not in TASKS:
        raise ValueError(unknown("task", name, list(TASKS)))
    return TASKS[key]


def _filled(template: str, row: Row) -> str:
    """Fill a template from the row's columns; a space within a column's text is one space."""
    return " ".join(template.format_map(row).split())


def _labelled(template: str, labels: tuple[str, ...], column: str, values: tuple[str, ...], group: str) -> Any:
    """Return a format function: `column` holds the index of the label, or one of `values`."""

    def make(row: Row) -> Example:
        value = str(row[column])
        if value not in values:
            raise ValueError(f"{column} is {value!r}, not one of {', '.join(values)}")
        label = values.index(value)
        return Example(_filled(template, row), (labels[label],), label, _filled(group, row) if group else None)

    return make


def _classification(
    name: str,
    dataset: str,
    config: str | None,
    template: str,
    labels: tuple[str, ...],
    *,
    column: str = "label",
    values: tuple[str, ...] = (),
    group: str = "",
    **settings: Any,
) -> Task:
    values = values or tuple(str(index) for index in range(len(labels)))
    make = _labelled(template, labels, column, values, group)
    return Task(name, dataset, config, make, labels=labels, **{"metrics": ("accuracy",), **settings})


def _similarity(row: Row) -> Example:
    """STS-B as T5 has it: the value in steps of 0.2, as text."""
    value = float(row["label"])
    if not 0 <= value <= 5:
        raise ValueError(f"label is {value}, not in [0, 5]")
    source = _filled("stsb sentence1: {sentence1} sentence2: {sentence2}", row)
    return Example(source, (f"{round(value * 5) / 5:.1f}",), value)


def _squad(row: Row) -> Example:
    answers = tuple(dict.fromkeys(row["answers"]["text"]))
    if not answers:
        raise ValueError("answers is empty")
    return Example(_filled("question: {question} context: {context}", row), answers, group=row["context"][:80])


def _hotpot(row: Row) -> Example:
    """All ten paragraphs, each behind its title; no context where the row has none (closed book)."""
    context = row.get("context") or {"title": [], "sentences": []}
    paragraphs = zip(context["title"], context["sentences"], strict=True)
    text = " ".join(f"{title}: {''.join(sentences)}" for title, sentences in paragraphs)
    source = _filled("hotpotqa question: {question}", row)
    return Example(f"{source} context: {' '.join(text.split())}" if text else source, (row["answer"],))


def _choices(count: int) -> tuple[str, ...]:
    return tuple(f"choice{number}" for number in range(1, count + 1))


GLUE, SUPER_GLUE = "nyu-mll/glue", "aps/super_glue"
FALSE_TRUE = ("False", "True")
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _classification(
            "sst2",
            GLUE,
            "sst2",
            "sst2 sentence: {sentence}",
            ("negative", "positive"),
            batch_size=64,
            learning_rate=1e-4,
        ),
        _classification(
            "mrpc",
            GLUE,
            "mrpc",
            "mrpc sentence1: {sentence1} sentence2: {sentence2}",
            ("not_equivalent", "equivalent"),
            metrics=("accuracy", "f1"),
        ),
        _classification(
            "multirc",
            SUPER_GLUE,
            "multirc",
            "multirc question: {question} answer: {answer} paragraph: {paragraph}",
            FALSE_TRUE,
            metrics=("f1a", "accuracy"),
            group="{idx[paragraph]} {idx[question]}",
            learning_rate=3e-5,
            max_source_length=512,
        ),
        _classification(
            "copa",
            SUPER_GLUE,
            "copa",
            "copa choice1: {choice1} choice2: {choice2} premise: {premise} question: {question}",
            _choices(2),
            batch_size=8,
            learning_rate=3e-5,
        ),
        _classification(
            "winogrande",
            "allenai/winogrande",
            "winogrande_xl",
            "winogrande sentence: {sentence} choice1: {option1} choice2: {option2}",
            _choices(2),
            column="answer",
            values=("1", "2"),
            learning_rate=1e-5,
        ),
        Task(
            "squad",
            "rajpurkar/squad",
            "plain_text",
            _squad,
            ("squad",),
            batch_size=16,
            max_source_length=512,
            max_target_length=32,
        ),
        _classification(
            "wikiqa",
            "microsoft/wiki_qa",
            None,
            "wikiqa question: {question} answer: {answer}",
            FALSE_TRUE,
            metrics=("accuracy", "f1", "ranking"),
            group="{question}",
            evaluation_split="test",
        ),
        Task(
            "hotpotqa",
            "hotpotqa/hotpot_qa",
            "distractor",
            _hotpot,
            ("hotpotqa",),
            learning_rate=1e-4,
            max_source_length=1024,
            max_target_length=32,
        ),
        _classification(
            "cola",
            GLUE,
            "cola",
            "cola sentence: {sentence}",
            ("unacceptable", "acceptable"),
            metrics=("matthews", "accuracy"),
        ),
        Task("stsb", GLUE, "stsb", _similarity, ("correlation",)),
        _classification(
            "rte",
            GLUE,
            "rte",
            "rte sentence1: {sentence1} sentence2: {sentence2}",
            ("entailment", "not_entailment"),
            max_source_length=256,
        ),
        _classification(
            "mnli",
            GLUE,
            "mnli",
            "mnli hypothesis: {hypothesis} premise: {premise}",
            ("entailment", "neutral", "contradiction"),
            evaluation_split="validation_matched",
        ),
        _classification(
            "qqp",
            GLUE,
            "qqp",
            "qqp question1: {question1} question2: {question2}",
            ("not_duplicate", "duplicate"),
            metrics=("accuracy", "f1"),
        ),
        _classification(
            "qnli", GLUE, "qnli", "qnli question: {question} sentence: {sentence}", ("entailment", "not_entailment")
        ),
        _classification(
            "openbookqa",
            "allenai/openbookqa",
            "main",
            "openbookqa question: {question_stem} choice1: {choices[text][0]} choice2: {choices[text][1]} "
            "choice3: {choices[text][2]} choice4: {choices[text][3]}",
            _choices(4),
            column="answerKey",
            values=("A", "B", "C", "D"),
        ),
        _classification(
            "hellaswag",
            "Rowan/hellaswag",
            None,
            "hellaswag context: {ctx} choice1: {endings[0]} choice2: {endings[1]} choice3: {endings[2]} "
            "choice4: {endings[3]}",
            _choices(4),
            max_source_length=256,
        ),
        _classification(
            "boolq",
            SUPER_GLUE,
            "boolq",
            "boolq question: {question} passage: {passage}",
            FALSE_TRUE,
            max_source_length=512,
        ),
    )
}
