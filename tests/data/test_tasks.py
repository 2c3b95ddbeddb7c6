"""Every task turns a row of its data set into text, and says what is wrong with one that is none of its own."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from hf_mcsmoe.data.tasks import TASKS, get_task, task_rows
from hf_mcsmoe.evaluation.metrics import METRICS

HUB = Path(__file__).parents[3] / "shared" / "data" / "hub"
# Task: a row as the Hub has it, the text it becomes, all gold answers and the label.
ROWS: dict[str, tuple[dict[str, Any], str, tuple[str, ...], int | float | None]] = {
    "sst2": ({"sentence": "kids , spirit ", "label": 1}, "sst2 sentence: kids , spirit", ("positive",), 1),
    "mrpc": (
        {"sentence1": "A.", "sentence2": "B.", "label": 0},
        "mrpc sentence1: A. sentence2: B.",
        ("not_equivalent",),
        0,
    ),
    "multirc": (
        {"paragraph": "P.", "question": "Q?", "answer": "A", "label": 1, "idx": {"paragraph": 3, "question": 7}},
        "multirc question: Q? answer: A paragraph: P.",
        ("True",),
        1,
    ),
    "copa": (
        {"premise": "P.", "choice1": "X.", "choice2": "Y.", "question": "cause", "label": 1},
        "copa choice1: X. choice2: Y. premise: P. question: cause",
        ("choice2",),
        1,
    ),
    "winogrande": (
        {"sentence": "Ian saw _ .", "option1": "Ian", "option2": "Bo", "answer": "2"},
        "winogrande sentence: Ian saw _ . choice1: Ian choice2: Bo",
        ("choice2",),
        1,
    ),
    "squad": (
        {"context": "C {x}.", "question": "Q?", "answers": {"text": ["a b", "a b", "b"], "answer_start": [0, 0, 2]}},
        "question: Q? context: C {x}.",
        ("a b", "b"),
        None,
    ),
    "wikiqa": ({"question": "q", "answer": "a\n b", "label": 0}, "wikiqa question: q answer: a b", ("False",), 0),
    "hotpotqa": (
        {"question": "Q?", "answer": "yes", "context": {"title": ["T", "U"], "sentences": [["A.", " B."], ["C."]]}},
        "hotpotqa question: Q? context: T: A. B. U: C.",
        ("yes",),
        None,
    ),
    "cola": ({"sentence": "S", "label": 0}, "cola sentence: S", ("unacceptable",), 0),
    "stsb": (
        {"sentence1": "A", "sentence2": "B", "label": 3.27},
        "stsb sentence1: A sentence2: B",
        ("3.2",),
        3.27,
    ),
    "rte": (
        {"sentence1": "A", "sentence2": "B", "label": 0},
        "rte sentence1: A sentence2: B",
        ("entailment",),
        0,
    ),
    "mnli": (
        {"premise": "P", "hypothesis": "H", "label": 2},
        "mnli hypothesis: H premise: P",
        ("contradiction",),
        2,
    ),
    "qqp": (
        {"question1": "A?", "question2": "B?", "label": 1},
        "qqp question1: A? question2: B?",
        ("duplicate",),
        1,
    ),
    "qnli": ({"question": "Q?", "sentence": "S", "label": 1}, "qnli question: Q? sentence: S", ("not_entailment",), 1),
    "openbookqa": (
        {"question_stem": "Q", "choices": {"text": ["a", "b", "c", "d"], "label": list("ABCD")}, "answerKey": "C"},
        "openbookqa question: Q choice1: a choice2: b choice3: c choice4: d",
        ("choice3",),
        2,
    ),
    "hellaswag": (
        {"ctx": "C", "endings": ["a", "b", "c", "d"], "label": "3"},
        "hellaswag context: C choice1: a choice2: b choice3: c choice4: d",
        ("choice4",),
        3,
    ),
    "boolq": ({"question": "q", "passage": "P", "label": 0}, "boolq question: q passage: P", ("False",), 0),
}
# The paper's table of settings: batch size and learning rate.
PAPER = {
    "sst2": (64, 1e-4),
    "mrpc": (32, 5e-5),
    "multirc": (32, 3e-5),
    "copa": (8, 3e-5),
    "winogrande": (32, 1e-5),
    "squad": (16, 5e-5),
    "wikiqa": (32, 5e-5),
    "hotpotqa": (32, 1e-4),
}


@pytest.mark.parametrize("name", TASKS)
def test_a_row_becomes_text_and_answers(name: str) -> None:
    row, source, targets, label = ROWS[name]
    (example,) = TASKS[name].examples([row])
    assert (example.source, example.targets, example.label) == (source, targets, label)


@pytest.mark.parametrize("name", PAPER)
def test_settings_are_the_papers(name: str) -> None:
    assert (TASKS[name].batch_size, TASKS[name].learning_rate) == PAPER[name]


@pytest.mark.parametrize("name", TASKS)
def test_metrics_exist_and_labels_fit_into_the_answer(name: str) -> None:
    task = TASKS[name]
    assert set(task.metrics) <= METRICS.keys()
    assert all(len(label) <= 4 * task.max_target_length for label in task.labels)


def test_answers_of_one_question_are_one_group() -> None:
    rows = [ROWS["multirc"][0] | {"idx": {"paragraph": p, "question": q, "answer": 0}} for p, q in ((0, 1), (1, 1))]
    groups = [example.group for example in TASKS["multirc"].examples([*rows, rows[0]])]
    assert groups[0] == groups[2] != groups[1]


def test_hotpotqa_without_paragraphs_is_asked_without_a_book() -> None:
    (example,) = TASKS["hotpotqa"].examples([{"question": "Q?", "answer": "no"}])
    assert example.source == "hotpotqa question: Q?"


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("sst2", {"label": -1}),
        ("winogrande", {"answer": ""}),
        ("hellaswag", {"label": ""}),
        ("squad", {"answers": {"text": [], "answer_start": []}}),
        ("stsb", {"label": -1.0}),
        ("hellaswag", {"endings": ["a", "b"]}),
    ],
)
def test_a_row_without_a_gold_answer_is_told(name: str, changes: dict[str, Any]) -> None:
    good = ROWS[name][0]
    with pytest.raises(ValueError, match=rf"Row 1 does not fit task '{name}'.*test splits without labels"):
        TASKS[name].examples([good, good | changes])


def test_a_row_of_another_task_is_told() -> None:
    with pytest.raises(ValueError, match=r"Row 0 does not fit task 'mrpc' \(KeyError: 'sentence1'\)"):
        TASKS["mrpc"].examples([ROWS["sst2"][0]])


@pytest.mark.parametrize(("spelling", "name"), [("SST-2", "sst2"), ("MultiRC", "multirc"), ("stsb", "stsb")])
def test_tasks_are_found_in_any_spelling(spelling: str, name: str) -> None:
    assert get_task(spelling).name == name


def test_an_unknown_task_is_told_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"Unknown task 'winogrand'\. Did you mean 'winogrande'"):
        get_task("winogrand")


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """Lay two splits of COPA out like the Hub."""
    folder = tmp_path / "aps" / "super_glue"
    folder.mkdir(parents=True)
    splits = {"train": 3, "validation": 2}
    files = "".join(f"  - split: {split}\n    path: copa.{split}.jsonl.gz\n" for split in splits)
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: copa\n  data_files:\n{files}---\n")
    for split, number in splits.items():
        lines = "\n".join(json.dumps(ROWS["copa"][0] | {"idx": index}) for index in range(number))
        (folder / f"copa.{split}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return tmp_path


def test_rows_come_from_a_folder_laid_out_like_the_hub_or_from_a_file(local: Path, tmp_path: Path) -> None:
    task = TASKS["copa"]
    assert [row["idx"] for row in task_rows(task, data_dir=local)] == [0, 1]
    assert [row["idx"] for row in task_rows(task, "train", data_dir=local, limit=2)] == [0, 1]
    path = local / "aps" / "super_glue" / "copa.train.jsonl.gz"
    assert task.examples(task_rows(task, data_dir=path)) == task.examples([ROWS["copa"][0]] * 3)


@pytest.mark.parametrize(
    ("name", "split"), [("copa", "test"), ("rte", "train"), ("squad", "train")], ids=["split", "config", "set"]
)
def test_missing_data_is_told_with_a_way_out(name: str, split: str, local: Path) -> None:
    with pytest.raises(ValueError, match=rf"Task '{name}' has no split '{split}' here: .*--train_split.*--train_file"):
        task_rows(TASKS[name], split, data_dir=local)


# Splits of the shared data, with the number of rows that its README (or the official data set) states.
LOCAL = {
    ("sst2", "train"): 67_349,
    ("sst2", "validation"): 872,
    ("mrpc", "train"): 3_668,
    ("mrpc", "validation"): 408,
    ("multirc", "validation"): 4_848,
    ("copa", "train"): 400,
    ("copa", "validation"): 100,
    ("winogrande", "validation"): 1_267,
    ("squad", "validation"): 10_570,
    ("wikiqa", "train"): 20_360,
    ("wikiqa", "test"): 6_165,
    ("hotpotqa", "validation"): 100,
    ("rte", "validation"): 277,
    ("openbookqa", "validation"): 500,
    ("hellaswag", "validation"): 10_042,
    ("boolq", "validation"): 3_270,
}


@pytest.mark.slow
@pytest.mark.skipif(not HUB.is_dir(), reason="needs ../shared/data/hub")
@pytest.mark.parametrize(("name", "split"), LOCAL)
def test_real_rows_become_text(name: str, split: str) -> None:
    task = TASKS[name]
    examples = task.examples(task_rows(task, split, data_dir=HUB))
    assert len(examples) == LOCAL[name, split]
    assert all(example.source and all(example.targets) for example in examples)
    if task.labels:
        assert {example.label for example in examples} == set(range(len(task.labels)))
    assert "{" not in examples[0].source
