"""Our metrics and losses against those of scikit-learn, torchmetrics and SciPy."""

import random

import pytest
import torch
from families import build, inputs
from scipy.special import log_softmax
from sklearn.metrics import f1_score, matthews_corrcoef
from torchmetrics.functional.classification import multiclass_accuracy
from torchmetrics.functional.retrieval import retrieval_average_precision, retrieval_reciprocal_rank
from torchmetrics.functional.text import perplexity as perplexity_oracle
from torchmetrics.functional.text import squad

from hf_mcsmoe.data.tasks import TASKS, Example
from hf_mcsmoe.distillation.losses import distillation_sums, kl_divergence
from hf_mcsmoe.evaluation.metrics import METRICS, Answer, binary_f1, matthews
from hf_mcsmoe.evaluation.quality import perplexity

SEEDS = range(5)
WORDS = ["the", "a", "An", "cat", "dog", "Dog,", "ran", "home.", "2", "yes"]


def _indices(seed: int, classes: int, length: int = 40) -> tuple[list[int], list[int]]:
    """Return what was said, -1 where that names no class, and what is true."""
    draw = random.Random(seed)
    return [draw.randrange(-1, classes) for _ in range(length)], [draw.randrange(classes) for _ in range(length)]


@pytest.mark.parametrize("seed", SEEDS)
def test_f1(seed: int) -> None:
    said, true = _indices(seed, 2)
    expected = f1_score([value == 1 for value in true], [value == 1 for value in said])
    assert binary_f1(said, true) == pytest.approx(expected)


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("seed", SEEDS)
def test_matthews(seed: int, classes: int) -> None:
    said, true = _indices(seed, classes)
    assert matthews(said, true) == pytest.approx(matthews_corrcoef(true, said))


@pytest.mark.parametrize("seed", SEEDS)
def test_accuracy(seed: int) -> None:
    task = TASKS["sst2"]
    said, true = _indices(seed, 2)
    answers = [Answer(task.labels[value] if value >= 0 else "nothing") for value in said]
    examples = [Example("", (task.labels[value],), value) for value in true]
    wrong = [value if value >= 0 else 1 - other for value, other in zip(said, true, strict=True)]
    expected = multiclass_accuracy(torch.tensor(wrong), torch.tensor(true), num_classes=2, average="micro")
    assert METRICS["accuracy"](task, answers, examples)["accuracy"] == pytest.approx(float(expected))


@pytest.mark.parametrize("seed", SEEDS)
def test_exact_match_and_f1_of_free_answers(seed: int) -> None:
    draw = random.Random(seed)
    texts = [
        [" ".join(["cat", *draw.choices(WORDS, k=draw.randint(0, 3))][::-1]) for _ in range(3)] for _ in range(30)
    ]
    answers = [Answer(said) for said, *_ in texts]
    examples = [Example("", tuple(gold)) for _, *gold in texts]
    expected = squad(
        [{"prediction_text": said, "id": str(row)} for row, (said, *_) in enumerate(texts)],
        [
            {"answers": {"text": gold, "answer_start": [0] * len(gold)}, "id": str(row)}
            for row, (_, *gold) in enumerate(texts)
        ],
    )
    figures = METRICS["squad"](TASKS["squad"], answers, examples)
    assert 100 * figures["exact_match"] == pytest.approx(float(expected["exact_match"]), abs=1e-4)
    assert 100 * figures["f1"] == pytest.approx(float(expected["f1"]), abs=1e-4)


@pytest.mark.parametrize("seed", SEEDS)
def test_mean_average_precision_and_reciprocal_rank(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(6, 8, 2, generator=generator, dtype=torch.float64)
    right = torch.rand(6, 8, generator=generator) < 0.3
    answers = [Answer("", (float(no), float(yes))) for no, yes in scores.flatten(0, 1)]
    examples = [Example("", ("",), int(right[row, place]), str(row)) for row in range(6) for place in range(8)]
    asked = [row for row in range(6) if right[row].any()]
    ranking = (scores[..., 1] - scores[..., 0]).sigmoid()  # the oracle leaves out what is not positive
    oracles = {"map": retrieval_average_precision, "mrr": retrieval_reciprocal_rank}
    figures = METRICS["ranking"](TASKS["wikiqa"], answers, examples)
    for name, oracle in oracles.items():
        expected = sum(float(oracle(ranking[row], right[row])) for row in asked) / len(asked)
        assert figures[name] == pytest.approx(expected, abs=1e-6)


def test_perplexity() -> None:
    model = build("mixtral").eval()
    batch = inputs("mixtral", model)
    with torch.no_grad():
        logits = model(**batch).logits
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    expected = perplexity_oracle(logits[:, :-1], labels[:, 1:], ignore_index=-100)
    assert perplexity(model, [batch]) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 7, 11, generator=generator)
    labels = torch.randint(0, 11, (3, 7), generator=generator).masked_fill(
        torch.rand(3, 7, generator=generator) < 0.3, -100
    )
    counted = labels != -100
    ours, theirs = (log_softmax(values.double().numpy() / temperature, -1) for values in (student, teacher))
    expected = temperature**2 * float(
        ((torch.tensor(theirs).exp() * torch.tensor(theirs - ours)).sum(-1) * counted).sum()
    )
    task = -float(torch.tensor(log_softmax(student.double().numpy(), -1)).gather(
        -1, labels.clamp(min=0)[..., None])[..., 0][counted].sum())  # fmt: skip
    assert float(kl_divergence(student, teacher, counted, temperature)) == pytest.approx(expected, rel=1e-5)
    sums = distillation_sums(student, teacher, labels, temperature)
    assert [float(value) for value in sums] == pytest.approx([task, expected], rel=1e-5)
