"""Distillation trainers: the loss over accumulated and padded batches, what is trained, resuming, errors, the card."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from distilled import KINDS, make_rows, make_student, make_trainer, other_vocabulary, stacked
from families import build
from merged import example
from transformers import PreTrainedModel
from transformers.trainer_pt_utils import LabelSmoother

from hf_mcsmoe import LoSparseConfig, decompose_experts, moe_layers
from hf_mcsmoe.distillation.losses import cross_entropy, kl_divergence

SWITCH, NAN = "switch_transformers", float("nan")


@pytest.mark.parametrize("name", KINDS)
def test_the_loss_is_the_mean_over_all_labels_that_count(name: str, tmp_path: Path) -> None:
    trainer, batch, case = make_trainer(name, tmp_path), stacked(make_rows()), example(name)
    with torch.no_grad():
        found = float(trainer.compute_loss(trainer.model.eval(), batch))
        assert float(trainer.compute_loss(trainer.model.train(), batch)) == pytest.approx(found, rel=1e-5)
        student, teacher = (model(**batch).logits for model in (case.merged, case.base))
    labels = batch["labels"]
    if name == "mixtral":
        student, teacher, labels = student[:, :-1], teacher[:, :-1], labels[:, 1:]
    counted = labels != -100
    total = cross_entropy(student, labels) + 0.2 * kl_divergence(student, teacher, counted, 2.0)
    assert found == pytest.approx(float(total) / int(counted.sum()), rel=1e-5)


def _trained(name: str, folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    trainer = make_trainer(name, folder, save_strategy="no", max_grad_norm=0, warmup_steps=0, **options)
    trainer.train()
    return dict(trainer.model.named_parameters())


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("term", ["kd_weight", pytest.param("hidden_weight", marks=pytest.mark.slow), "expert_weight"])
def test_neither_accumulation_nor_padding_changes_a_step(name: str, term: str, tmp_path: Path) -> None:
    weights = {"kd_weight": 0.0, "hidden_weight": 0.0, "expert_weight": 0.0, term: 20.0}
    plain = {"max_steps": 1, "per_device_train_batch_size": 8, "optim": "sgd", **weights}
    halves = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    expected = _trained(name, tmp_path / "a", **plain)
    without = _trained(name, tmp_path / "b", **plain | {term: 0.0})
    assert any(not torch.allclose(value, without[key], atol=1e-4) for key, value in expected.items())
    for number, options in enumerate([halves, {"rows": make_rows(padding=3)}]):
        for key, value in _trained(name, tmp_path / str(number), **plain | options).items():
            torch.testing.assert_close(value, expected[key], atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("parts", "routers"), [("all", False), ("experts", False), ("routers", True)])
def test_only_the_chosen_parts_change(name: str, parts: str, routers: bool, tmp_path: Path) -> None:
    trainer = make_trainer(name, tmp_path, train_parts=parts, save_strategy="no")
    trainer.train()
    before = dict(example(name).merged.named_parameters())
    changed = {key for key, value in trainer.model.named_parameters() if not torch.equal(value, before[key])}
    layers = moe_layers(trainer.model)
    of_experts = {f"{layer.name}.{key}" for layer in layers for key, _ in layer.parameters}
    of_routers = {
        key
        for key, value in trainer.model.named_parameters()
        if any(value is parameter for layer in layers for parameter in layer.router.parameters())
    }
    assert bool(changed & of_routers) == routers
    assert bool(changed & of_experts) == (parts != "routers")
    assert bool(changed - of_experts - of_routers) == (parts == "all")


def test_the_teacher_stays_and_the_student_comes_nearer(tmp_path: Path) -> None:
    teacher = build("mixtral")
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    trainer = make_trainer("mixtral", tmp_path, teacher=teacher, max_steps=30, kd_weight=1e4, save_strategy="no")
    trainer.train()
    losses = [entry["kd_loss"] for entry in trainer.state.log_history if "kd_loss" in entry]
    assert len(losses) == 30
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert not any("teacher" in key for key in trainer.model.state_dict())


@pytest.mark.parametrize("name", KINDS)
def test_a_killed_run_resumes_as_if_nothing_had_happened(name: str, tmp_path: Path) -> None:
    def student() -> PreTrainedModel:
        return decompose_experts(make_student(name), LoSparseConfig(rank=2, keep=0.5))

    whole = make_trainer(name, tmp_path / "whole", model=student(), max_steps=4)
    whole.train()
    again = make_trainer(name, tmp_path / "again", model=student(), max_steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    expected = dict(whole.model.named_parameters())
    assert all(torch.equal(value, expected[key]) for key, value in again.model.named_parameters())
    logged = [
        [entry["task_loss"] for entry in run.state.log_history if "task_loss" in entry] for run in (whole, again)
    ]
    assert logged[0] == logged[1]
    assert len(logged[0]) == 4


def test_the_saved_folder_loads_and_its_card_tells_of_the_distillation(tmp_path: Path) -> None:
    trainer = make_trainer("mixtral", tmp_path / "out")
    trainer.train()
    trainer.save_model(tmp_path / "final")
    trainer.create_model_card()
    card = (tmp_path / "final" / "README.md").read_text()
    assert "## Distillation\n\nTrained for 2 steps" in card
    assert "temperature T = 2.0" in card
    assert "## Experts per layer" in card
    loaded = type(trainer.model).from_pretrained(tmp_path / "final")
    batch = example("mixtral").batch
    assert torch.equal(loaded(**batch).logits, trainer.model.eval()(**batch).logits)


@pytest.mark.parametrize("name", KINDS)
def test_an_evaluation_reports_each_term_and_predicts_the_logits_alone(name: str, tmp_path: Path) -> None:
    options = {"kd_weight": 3.0, "hidden_weight": 0.5, "expert_weight": 0.25, "per_device_eval_batch_size": 4}
    trainer = make_trainer(name, tmp_path, **options)
    metrics = trainer.evaluate(make_rows())
    terms = {term: metrics[f"eval_{term}"] for term in ("task_loss", "kd_loss", "hidden_loss", "expert_loss")}
    weights = {"task_loss": 1.0, "kd_loss": 3.0, "hidden_loss": 0.5, "expert_loss": 0.25}
    assert min(terms.values()) > 0
    assert metrics["eval_loss"] == pytest.approx(sum(weights[term] * value for term, value in terms.items()), rel=1e-4)
    predicted = trainer.predict(make_rows())
    assert predicted.metrics.keys() >= {f"test_{term}" for term in terms}
    found = predicted.predictions[0] if isinstance(predicted.predictions, tuple) else predicted.predictions
    with torch.no_grad():
        expected = trainer.student(**stacked(make_rows())).logits
    torch.testing.assert_close(torch.tensor(found), expected, atol=1e-5, rtol=1e-4)
    shapes = [part.shape for part in (predicted.predictions if isinstance(predicted.predictions, tuple) else [found])]
    assert len(shapes) <= 2  # a seq2seq model returns the encoder's output as well


@pytest.mark.parametrize("name", KINDS)
def test_a_term_of_an_evaluation_is_the_mean_over_rows_of_unequal_batches(name: str, tmp_path: Path) -> None:
    trainer = make_trainer(name, tmp_path, per_device_eval_batch_size=3)
    found, total = trainer.evaluate(make_rows())["eval_task_loss"], 0.0
    for first in (0, 3, 6):
        rows = make_rows()[first : first + 3]
        with torch.no_grad():
            total += len(rows) * float(trainer.student(**stacked(rows)).loss)
    assert found == pytest.approx(total / 8, rel=1e-5)


def test_an_evaluation_that_generates_has_the_loss_of_the_training(tmp_path: Path) -> None:
    options = {"predict_with_generate": True, "generation_max_length": 5, "label_smoothing_factor": 0.1}
    found = make_trainer("switch_transformers", tmp_path, **options).evaluate(make_rows())
    expected = make_trainer("switch_transformers", tmp_path, label_smoothing_factor=0.1).evaluate(make_rows())
    for key in ("eval_loss", "eval_task_loss", "eval_kd_loss"):
        assert found[key] == pytest.approx(expected[key], rel=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_label_smoothing_is_that_of_the_trainer(name: str, tmp_path: Path) -> None:
    trainer = make_trainer(name, tmp_path, label_smoothing_factor=0.2, kd_weight=0.0)
    batch = stacked(make_rows())
    with torch.no_grad():
        found = float(trainer.compute_loss(trainer.model.eval(), batch))
        outputs = trainer.model(**batch)
    expected = LabelSmoother(0.2)(outputs, batch["labels"], shift_labels=name == "mixtral")
    assert found == pytest.approx(float(expected), rel=1e-5)
    assert found != pytest.approx(float(outputs.loss), rel=1e-4)


def test_a_teacher_may_be_a_path_and_of_another_dtype(tmp_path: Path) -> None:
    case = example("mixtral")
    copy.deepcopy(case.base).to(torch.bfloat16).save_pretrained(tmp_path / "teacher")
    trainers = {
        "path": make_trainer("mixtral", tmp_path / "a", teacher=str(tmp_path / "teacher"), teacher_dtype="float32"),
        "folder": make_trainer("mixtral", tmp_path / "b", teacher=tmp_path / "teacher"),
        "model": make_trainer("mixtral", tmp_path / "c", teacher=copy.deepcopy(case.base).to(torch.bfloat16)),
    }
    assert trainers["path"].teacher.dtype == torch.float32
    assert trainers["folder"].teacher.dtype == trainers["model"].teacher.dtype == torch.bfloat16
    for trainer in trainers.values():
        trainer.train()
        assert trainer.student.dtype == torch.float32
        assert {value.dtype for value in trainer.student.parameters()} == {torch.float32}
    losses = {key: trainer.state.log_history[0]["kd_loss"] for key, trainer in trainers.items()}
    assert list(losses.values()) == pytest.approx([losses["path"]] * 3, rel=0.05)


def _of_another_model(folder: Path) -> None:
    first = make_trainer("mixtral", folder / "first", max_steps=1)
    first.train()
    other = copy.deepcopy(example("mixtral").merged)
    layer = next(iter(other.config.mcsmoe["layers"].values()))
    layer["expert_map"] = layer["expert_map"][::-1]
    make_trainer("mixtral", folder / "second", model=other).train(
        resume_from_checkpoint=str(folder / "first" / "checkpoint-1")
    )


def _with_broken_weights(folder: Path) -> None:
    model = make_student("mixtral")
    model.lm_head.weight.data[0, 0] = float("nan")
    make_trainer("mixtral", folder, model=model).train()


def _masked(folder: Path) -> None:
    rows = [{**row, "labels": torch.full_like(row["labels"], -100)} for row in make_rows()]
    make_trainer("mixtral", folder, rows=rows).train()


@pytest.mark.parametrize(
    ("attempt", "error", "message"),
    [
        (lambda folder: make_trainer("mixtral", folder, model=build("mixtral")), ValueError, "is not compressed"),
        (lambda folder: make_trainer("mixtral", folder, teacher=other_vocabulary()), ValueError, "vocabulary"),
        (lambda folder: make_trainer("mixtral", folder, train_parts="expert"), ValueError, "Did you mean 'experts'"),
        (lambda folder: make_trainer("mixtral", folder, kd_temperature=0.0), ValueError, "must be positive"),
        (lambda folder: make_trainer("mixtral", folder, kd_temperature=NAN), ValueError, "kd_temperature=nan must be"),
        (lambda folder: make_trainer("mixtral", folder, kd_weight=NAN), ValueError, "kd_weight=nan must be a finite"),
        (lambda folder: make_trainer("mixtral", folder, hidden_weight=-1.0), ValueError, "not negative"),
        (lambda folder: make_trainer("mixtral", folder, teacher=example(SWITCH).base), ValueError, "one of its kind"),
        (lambda folder: make_trainer(SWITCH, folder, teacher=build("mixtral")), ValueError, "one of its kind"),
        (lambda folder: make_trainer("mixtral", folder, teacher=build("mixtral").model), ValueError, "of its kind"),
        (lambda folder: make_trainer("mixtral", folder, rows=[]), ValueError, "training set is empty"),
        (lambda folder: make_trainer("mixtral", folder, rows=[], expert_weight=1.0), ValueError, "set is empty"),
        (lambda folder: make_trainer("mixtral", folder, teacher=str(folder / "none")), ValueError, "is no folder"),
        (_masked, ValueError, "No label of the batch counts"),
        (_with_broken_weights, RuntimeError, "no checkpoint was saved yet"),
        (_of_another_model, ValueError, "another model"),
    ],
    ids=[
        *("dense", "vocabulary", "parts", "temperature", "temperature nan", "weight nan", "negative weight"),
        *("encoder-decoder teacher", "causal teacher", "teacher without a head", "no rows", "no rows for experts"),
        *("teacher", "masked", "nan", "resume"),
    ],
)
def test_bad_input(attempt: Any, error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        attempt(tmp_path)
