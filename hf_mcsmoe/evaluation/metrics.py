"""The benchmarks' own metrics, in [0, 1] or [-1, 1]: answers against all gold answers.

An answer's text is what the model wrote, and counts as the label that it is word for word, or as none.
"""

import math
import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, cast

from scipy import stats

from hf_mcsmoe.data.tasks import Example, Task


class Answer(NamedTuple):
    """What a model says to an example: text, and each label's log-likelihood where these were asked."""

    text: str
    likelihoods: tuple[float, ...] = ()


def mean(values: Iterable[float]) -> float:
    """Return the mean of at least one value."""
    listed = list(values)
    return sum(listed) / len(listed)


def _indices(task: Task, answers: Sequence[Answer]) -> list[int]:
    """Return the label that each answer names, -1 where it names none."""
    return [task.labels.index(answer.text) if answer.text in task.labels else -1 for answer in answers]


def _accuracy(task: Task, answers: Sequence[Answer], examples: Sequence[Example]) -> dict[str, float]:
    return {"accuracy": mean(answer.text in item.targets for answer, item in zip(answers, examples, strict=True))}


def binary_f1(predicted: Sequence[int], gold: Sequence[int]) -> float:
    """Return F1 = 2 TP / (2 TP + FP + FN) of class 1; an answer that is no label (-1) finds nothing."""
    found = sum(p == g == 1 for p, g in zip(predicted, gold, strict=True))
    named = sum(p == 1 for p in predicted) + sum(g == 1 for g in gold)
    return 2 * found / named if named else 0.0


def _f1(task: Task, answers: Sequence[Answer], examples: Sequence[Example]) -> dict[str, float]:
    return {"f1": binary_f1(_indices(task, answers), [cast(int, item.label) for item in examples])}


def _f1a(task: Task, answers: Sequence[Answer], examples: Sequence[Example]) -> dict[str, float]:
    """MultiRC: F1 over all answers of all questions, and the share of questions with every answer right."""
    whole: dict[str | None, bool] = defaultdict(lambda: True)
    for answer, item in zip(answers, examples, strict=True):
        whole[item.group] &= answer.text in item.targets
    return {"f1a": _f1(task, answers, examples)["f1"], "exact_match": mean(whole.values())}


def matthews(predicted: Sequence[int], gold: Sequence[int]) -> float:
    """Return cov(predicted, gold) / sqrt(var(predicted) var(gold)), Matthews' correlation, for any number of classes.

    0 where either never varies (Gorodkin 2004).
    """
    right = sum(p == g for p, g in zip(predicted, gold, strict=True))
    total, said, true = len(gold), Counter(predicted), Counter(gold)
    covariance = right * total - sum(said[label] * true[label] for label in true)
    variances = [total**2 - sum(count**2 for count in counts.values()) for counts in (said, true)]
    return covariance / math.sqrt(variances[0] * variances[1]) if all(variances) else 0.0


def _matthews(task: Task, answers: Sequence[Answer], examples: Sequence[Example]) -> dict[str, float]:
    return {"matthews": matthews(_indices(task, answers), [cast(int, item.label) for item in examples])}


def _number(text: str) -> float:
    """Return the number that an answer states, -1 where it states none (as T5)."""
    try:
        value = float(text)
    except ValueError:
        return -1.0
    return value if math.isfinite(value) else -1.0


def _correlation(task: Task, answers: Sequence[Answer], examples: Sequence[Example]) -> dict[str, float]:
    """Pearson's and Spearman's correlation; 0 where either side never varies."""
    said, true = [_number(answer.text) for answer in answers], [float(cast(float, item.label)) for item in examples]
    if len(set(said)) == 1 or len(set(true)) == 1:
        return {"pearson": 0.0, "spearman": 0.0}
    return {"pearson": float(stats.pearsonr(said, true)[0]), "spearman": float(stats.spearmanr(said, true)[0])}


def _ranking(task: Task, answers: Sequence[Answer], examples: Sequence[Example]) -> dict[str, float]:
    """Mean average precision and mean reciprocal rank of a question's right candidates (WikiQA, Yang et al. 2015).

    Candidates, the examples of one group, are ranked by how much likelier label 1 is than label 0; questions without a
    right one do not count. Nothing without likelihoods.
    """
    if not all(answer.likelihoods for answer in answers):
        return {}
    groups: dict[str | None, list[tuple[float, bool]]] = defaultdict(list)
    for answer, item in zip(answers, examples, strict=True):
        groups[item.group].append((answer.likelihoods[0] - answer.likelihoods[1], item.label == 1))
    precisions, reciprocals = [], []
    for candidates in groups.values():
        ordered = sorted(candidates, key=lambda candidate: candidate[0])
        ranks = [rank for rank, (_, right) in enumerate(ordered, start=1) if right]
        if ranks:
            precisions.append(mean(found / rank for found, rank in enumerate(ranks, start=1)))
            reciprocals.append(1 / ranks[0])
    return {"map": mean(precisions), "mrr": mean(reciprocals)} if precisions else {}


def normalised_answer(text: str) -> str:
    """Return a text as SQuAD compares it: lower case, no punctuation, no articles, single spaces."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def answer_f1(answer: str, gold: str) -> float:
    """Return F1 = 2 shared / (words of the answer + words of the gold answer), as SQuAD."""
    said, true = normalised_answer(answer).split(), normalised_answer(gold).split()
    shared = sum((Counter(said) & Counter(true)).values())
    return 2 * shared / (len(said) + len(true)) if shared else 0.0


def _closed_f1(answer: str, gold: str) -> float:
    """HotpotQA: yes, no and noanswer are right or wrong, and share no words with anything else."""
    said, true = normalised_answer(answer), normalised_answer(gold)
    closed = {"yes", "no", "noanswer"} & {said, true}
    return float(said == true) if closed else answer_f1(answer, gold)


def _answers(overlap: Callable[[str, str], float]) -> Callable[..., dict[str, float]]:
    """Return the metric of free answers: exact match and F1, each against the nearest gold answer."""

    def metric(task: Task, answers: Sequence[Answer], examples: Sequence[Example]) -> dict[str, float]:
        pairs = [(answer.text, item) for answer, item in zip(answers, examples, strict=True)]
        exact = mean(normalised_answer(text) in map(normalised_answer, item.targets) for text, item in pairs)
        best = mean(max(overlap(text, target) for target in item.targets) for text, item in pairs)
        return {"exact_match": exact, "f1": best}

    return metric


METRICS: dict[str, Callable[[Task, Sequence[Answer], Sequence[Example]], dict[str, float]]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "f1a": _f1a,
    "matthews": _matthews,
    "correlation": _correlation,
    "ranking": _ranking,
    "squad": _answers(answer_f1),
    "hotpotqa": _answers(_closed_f1),
}
