"""Classifiers: labels of texts, of tokens and of spans, in statistics and distillation; own loss functions."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from distilled import make_rows, make_trainer
from families import build
from helpers import Batch
from merged import example
from torch.distributions import Bernoulli, Categorical, kl_divergence
from transformers import (
    MixtralForQuestionAnswering,
    MixtralForSequenceClassification,
    MixtralForTokenClassification,
    PreTrainedModel,
)

from hf_mcsmoe import MergeConfig, collect_statistics, compress
from hf_mcsmoe.layers.batches import token_masks

CLASSES: dict[str, Any] = {
    "texts": MixtralForSequenceClassification,
    "tokens": MixtralForTokenClassification,
    "spans": MixtralForQuestionAnswering,
}
# Of a kind of labels: the class, how many, the problem type, and the labels of eight texts of six tokens.
KINDS: dict[str, tuple[str, int, str | None, dict[str, Any]]] = {
    "one class": ("texts", 3, None, {"labels": [0, 2, 1, 1, 0, 2, 2, 1]}),
    "several classes": ("texts", 6, None, {"labels": [[float((n * k) % 3 == 1) for k in range(6)] for n in range(8)]}),
    "several in whole numbers": (
        "texts",
        6,
        "multi_label_classification",
        {"labels": [[float((n + k) % 2) for k in range(6)] for n in range(8)]},
    ),
    "number": ("texts", 1, None, {"labels": [0.5 * n for n in range(8)]}),
    "numbers in a column": ("texts", 1, None, {"labels": [[0.5 * n] for n in range(8)]}),
    "numbers": ("texts", 2, "regression", {"labels": [[0.5 * n, -1.0 * n] for n in range(8)]}),
    "tokens": (
        "tokens",
        4,
        None,
        {"labels": [[-100 if k < n % 3 else (n + k) % 4 for k in range(6)] for n in range(8)]},
    ),
    "spans": ("spans", 2, None, {"start_positions": [0, 1, 2, 3] * 2, "end_positions": [2, 3, 4, 5] * 2}),
}


def make_classifier(kind: str, seed: int = 0) -> PreTrainedModel:
    task, number, problem, _ = KINDS[kind]
    config = copy.deepcopy(build("mixtral").config)
    config.num_labels, config.problem_type, config.pad_token_id = number, problem, 0
    torch.manual_seed(seed)
    return CLASSES[task](config).eval()


def labelled_rows(kind: str) -> list[Batch]:
    labels = KINDS[kind][3]
    tensors = {name: torch.tensor(value) for name, value in labels.items()}
    if kind == "several in whole numbers":
        tensors = {"labels": tensors["labels"].long()}
    rows = [{name: value for name, value in row.items() if name != "labels"} for row in make_rows()]
    return [{**row, **{name: value[number] for name, value in tensors.items()}} for number, row in enumerate(rows)]


def batch_of(rows: list[Batch]) -> Batch:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def trainer_of(kind: str, folder: Path, **options: Any) -> Any:
    student, teacher = make_classifier(kind), make_classifier(kind, seed=1)
    options = {"kd_temperature": 3.0, "allow_uncompressed": True, "rows": labelled_rows(kind)} | options
    return make_trainer("mixtral", folder, model=student, teacher=teacher, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_only_labels_of_tokens_are_masks(kind: str) -> None:
    model, batch = make_classifier(kind), batch_of(labelled_rows(kind))
    expected = batch["attention_mask"].bool()
    if kind == "tokens":
        expected = expected & (batch["labels"] != -100)
    assert torch.equal(token_masks(model, batch)["decoder"], expected.flatten())
    if kind != "several in whole numbers":  # of which the model computes no loss
        statistics = collect_statistics(model, [batch])
        assert {int(layer["tokens"]) for layer in statistics.layers.values()} == {int(expected.sum())}


def expected_divergence(kind: str, ours: Any, theirs: Any, labels: Batch) -> torch.Tensor:
    """Compute the divergence, a mean over the labels, by the distributions of torch, or by squares."""
    if kind == "spans":
        pairs = [(ours[name], theirs[name]) for name in ("start_logits", "end_logits")]
        return torch.stack(
            [9 * kl_divergence(*(Categorical(logits=x / 3) for x in pair[::-1])).mean() for pair in pairs]
        ).mean()
    if "number" in kind and "several" not in kind:
        return (ours.logits - theirs.logits).square().mean()
    kind_of = Bernoulli if "several" in kind else Categorical
    divergence = 9 * kl_divergence(*(kind_of(logits=item.logits / 3) for item in (theirs, ours)))
    return divergence[labels["labels"] != -100].mean() if kind == "tokens" else divergence.mean()


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_models_own_and_the_divergence_of_all_outputs(kind: str, tmp_path: Path) -> None:
    trainer = trainer_of(kind, tmp_path, kd_weight=0.5)
    batch = batch_of(labelled_rows(kind))
    student, teacher = trainer.model, trainer.teacher
    given = {
        name: value.float() if kind == "several in whole numbers" and name == "labels" else value
        for name, value in batch.items()
    }
    with torch.no_grad():
        own = student(**given).loss
        ours, theirs = (model(batch["input_ids"], batch["attention_mask"]) for model in (student, teacher))
        expected = own + 0.5 * expected_divergence(kind, ours, theirs, batch)
    torch.testing.assert_close(trainer.compute_loss(student, batch), expected)


@pytest.mark.parametrize("kind", ["several classes", "spans"])
def test_accumulated_batches_are_one_batch_and_an_evaluation_tells_the_terms(kind: str, tmp_path: Path) -> None:
    states = []
    for number, (size, parts) in enumerate([(8, 1), (2, 4)]):
        rows = labelled_rows(kind)
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts, "eval_dataset": rows}
        trainer = trainer_of(
            kind, tmp_path / str(number), **options, max_steps=1, save_strategy="no", max_grad_norm=1e9
        )
        trainer.train()
        states.append(trainer.state.log_history[0]["grad_norm"])
        figures = trainer.evaluate()
        terms = figures["eval_task_loss"] + trainer.args.kd_weight * figures["eval_kd_loss"]
        assert figures["eval_loss"] == pytest.approx(terms, rel=1e-5)
    assert states[0] == pytest.approx(states[1], rel=1e-4)


@pytest.mark.filterwarnings("ignore:Few calibration tokens")
def test_a_merged_classifier_is_distilled_and_measured_by_its_own_metrics(tmp_path: Path) -> None:
    teacher, rows = make_classifier("one class"), labelled_rows("one class")
    student = compress(teacher, [batch_of(rows)], MergeConfig(experts=2))
    trainer = make_trainer("mixtral", tmp_path, model=student, teacher=teacher, rows=rows, eval_dataset=rows)
    trainer.compute_metrics = lambda found: {
        "shape": found.predictions.shape == (8, 3),
        "labels": len(found.label_ids),
    }
    trainer.preprocess_logits_for_metrics = lambda logits, labels: logits.softmax(-1)
    trainer.train()
    figures = trainer.evaluate()
    assert figures["eval_shape"]
    assert figures["eval_labels"] == 8


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("one class", {"hidden_weight": 1.0}, "hidden_weight=1.0 needs a label for each token"),
    ("spans", {"reference_kd": True}, "reference_kd=True needs a label for each token"),
    ("one class", {"teacher_outputs": "stored"}, "teacher_outputs=stored needs a label for each token"),
    ("tokens", {"teacher_outputs": "stored"}, "teacher_outputs are of models that write text"),
]


@pytest.mark.parametrize(("kind", "options", "message"), REFUSED)
def test_losses_that_classifiers_do_not_have_are_refused(
    kind: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        trainer_of(kind, tmp_path, **options)


def test_labels_that_do_not_fit_the_outputs_are_refused(tmp_path: Path) -> None:
    trainer = trainer_of("several classes", tmp_path)
    batch = batch_of(labelled_rows("several in whole numbers"))  # of six classes and six tokens
    with pytest.raises(
        ValueError, match=r"8 texts have labels of shape \[8, 6\], the model 6 outputs and .*set problem_type"
    ):
        trainer.compute_loss(trainer.model, batch)
    smooth = trainer_of("number", tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match=r"label_smoothing_factor=0\.1 is for labels of one class"):
        smooth.compute_loss(smooth.model, batch_of(labelled_rows("number")))
    spans = trainer_of("spans", tmp_path)
    with pytest.raises(ValueError, match="needs start_positions and end_positions; the batch has"):
        spans.compute_loss(spans.model, batch_of(make_rows()))


def test_a_teacher_of_other_classes_or_labels_is_refused(tmp_path: Path) -> None:
    student, teacher = make_classifier("one class"), make_classifier("one class")
    teacher.config.id2label = {0: "LABEL_1", 1: "LABEL_0", 2: "LABEL_2"}
    options: dict[str, Any] = {"model": student, "rows": labelled_rows("one class"), "allow_uncompressed": True}
    with pytest.raises(ValueError, match=r"The teacher tells the classes .* with the same id2label"):
        make_trainer("mixtral", tmp_path, teacher=teacher, **options)
    with pytest.raises(ValueError, match="The teacher is a MixtralForCausalLM, the student a MixtralForSequence"):
        make_trainer("mixtral", tmp_path, teacher=example("mixtral").base, **options)
    with pytest.raises(ValueError, match="The teacher is the student itself"):
        make_trainer("mixtral", tmp_path, teacher=student, **options)


def test_a_loss_function_takes_the_place_of_the_tasks_loss_as_in_a_trainer(tmp_path: Path) -> None:
    seen, norms = [], []

    def function(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        seen.append((tuple(labels.shape), int(num_items_in_batch)))
        logits, labels = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return 3 * torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch

    for number, (size, parts) in enumerate([(8, 1), (2, 4)]):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts, "save_strategy": "no"}
        options |= {
            "max_steps": 1,
            "max_grad_norm": 1e9,
            "eval_dataset": make_rows(),
        }
        trainer = make_trainer("mixtral", tmp_path / str(number), **options, compute_loss_func=function)
        batch = batch_of(make_rows())
        counted = int((batch["labels"][:, 1:] != -100).sum())
        seen.clear()
        trainer.train()
        assert seen == [((size, 6), counted)] * parts
        norms.append(trainer.state.log_history[0]["grad_norm"])
    plain, figures = make_trainer("mixtral", tmp_path / "plain", **options), trainer.evaluate()
    plain.model.load_state_dict(trainer.model.state_dict())
    expected = plain.evaluate()
    assert figures["eval_task_loss"] == pytest.approx(3 * expected["eval_task_loss"], rel=1e-5)
    assert figures["eval_kd_loss"] == pytest.approx(expected["eval_kd_loss"], rel=1e-5)
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
