"""The expert-output loss against a plain computation, and that it leaves no hook behind."""

from pathlib import Path
from typing import Any

import pytest
import torch
from distilled import KINDS, make_rows, make_student, make_trainer, stacked
from families import build, inputs
from helpers import state
from merged import example, merge
from torch import nn
from transformers import PreTrainedModel

from hf_mcsmoe import LoSparseConfig, decompose_experts
from hf_mcsmoe.distillation.expert_outputs import ExpertOutputs, observed_outputs


def outputs_of(model: PreTrainedModel, paths: list[str], batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return what the modules at some paths return in a forward, as [T, D]."""
    found: dict[str, torch.Tensor] = {}
    handles = []
    for path in paths:

        def keep(module: nn.Module, arguments: tuple, output: Any, path: str = path) -> None:
            output = output[0] if isinstance(output, tuple) else output
            found[path] = output.detach().flatten(0, -2).double()

        handles.append(model.get_submodule(path).register_forward_hook(keep))
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return [found[path] for path in paths]


def relative_errors(name: str, student: PreTrainedModel, batch: dict[str, torch.Tensor]) -> list[float]:
    """Return the relative error of each layer, by module paths that hold for both models."""
    paths = [path.removesuffix(".experts") if name != "mixtral" else path for path in example(name).plan.layers]
    errors = []
    found = (outputs_of(model, paths, batch) for model in (student, example(name).base))
    for path, ours, theirs in zip(paths, *found, strict=True):
        mask = batch["attention_mask"] if path.startswith("encoder") else batch["labels"] != -100
        counted = mask.bool().flatten()
        errors.append(float((ours - theirs)[counted].square().mean() / theirs[counted].square().mean()))
    return errors


@pytest.mark.parametrize("form", ["dense", "decomposed"])
@pytest.mark.parametrize("name", KINDS)
def test_the_term_is_the_mean_over_layers_of_their_relative_errors(name: str, form: str, tmp_path: Path) -> None:
    student = make_student(name)
    if form == "decomposed":
        decompose_experts(student, LoSparseConfig(rank=2, keep=0.5), prune=True)
    trainer = make_trainer(name, tmp_path, model=student, expert_weight=1.0, kd_weight=0.0)
    plain = make_trainer(name, tmp_path, model=student, kd_weight=0.0)
    batch, before = stacked(make_rows()), state(student)
    with torch.no_grad():
        found = trainer.compute_loss(student.eval(), batch) - plain.compute_loss(student, batch)
    errors = relative_errors(name, student, batch)
    assert min(errors) > 0
    assert float(found) == pytest.approx(sum(errors) / len(errors), rel=1e-4)
    assert {key: value for key, value in state(student).items() if key == "hooks"} == {"hooks": before["hooks"]}


@pytest.mark.parametrize("name", KINDS)
def test_gradient_checkpointing_changes_nothing(name: str, tmp_path: Path) -> None:
    options = {"expert_weight": 1.0, "max_steps": 1, "optim": "sgd", "save_strategy": "no", "warmup_steps": 0}
    trained = []
    for number, checkpointed in enumerate((False, True)):
        trainer = make_trainer(name, tmp_path / str(number), activation_checkpointing=checkpointed, **options)
        trainer.train()
        trained.append(dict(trainer.student.named_parameters()))
    assert trained[0].keys() == trained[1].keys()
    for key, value in trained[0].items():
        torch.testing.assert_close(trained[1][key], value)


def test_reentrant_checkpointing_would_train_nothing_and_is_refused(tmp_path: Path) -> None:
    options = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}
    trainer = make_trainer("mixtral", tmp_path, expert_weight=1.0, train_parts="experts", **options)
    with pytest.raises(ValueError, match="of the reentrant kind"):
        trainer.train()


def test_the_loss_brings_the_layers_nearer(tmp_path: Path) -> None:
    options = {"expert_weight": 10.0, "kd_weight": 0.0, "max_steps": 20, "train_parts": "experts", "warmup_steps": 0}
    trainer = make_trainer("mixtral", tmp_path, save_strategy="no", **options)
    trainer.train()
    losses = [entry["expert_loss"] for entry in trainer.state.log_history if "expert_loss" in entry]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("name", ["llama4_text", "jetmoe", "dbrx", "qwen2_moe", "gpt_oss"])
def test_layers_are_found_on_both_sides_in_other_layouts(name: str) -> None:
    base = build(name)
    _, student = merge(base, name)
    batch = inputs(name, base)
    compared = ExpertOutputs(student, base)
    compared.measure([batch])
    assert all(scale > 0 for scale in compared.scales.values())
    outputs = []
    for model in (student, base):
        with torch.no_grad(), observed_outputs(model, compared.layers) as found:
            model(**batch)
        outputs.append(found)
    tokens = compared.count_tokens([batch])
    assert int(tokens["decoder"]) == int(batch["attention_mask"].sum())
    same = compared.error(batch, outputs[1], outputs[1], tokens)
    assert float(same) == 0.0
    assert 0 < float(compared.error(batch, *outputs, tokens)) < 10


def test_a_teacher_of_other_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no counterpart of the teacher's layers"):
        make_trainer("mixtral", tmp_path, teacher=build("dbrx"), expert_weight=1.0)
