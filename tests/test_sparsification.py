"""Pruning rows of S: the schedule, scores, one threshold over all weights, and the callback in a Trainer."""

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from distilled import make_rows as _rows
from distilled import make_student as _student
from distilled import make_trainer as _trainer
from distilled import stacked as _stacked
from merged import example
from torch import nn

from hf_mcsmoe import LoSparseConfig, LoSparseLinear, SparsificationCallback, decompose_experts
from hf_mcsmoe.modeling.losparse_mcsmoe import sparse_parts
from hf_mcsmoe.sparsification import kept_share, prune_rows, row_scores, zero_shot_importance


@pytest.mark.parametrize(
    ("step", "share"),
    # keep 0.1, start 2, end 3, total 13: eight steps of pruning, 0.1 + 0.9 (1 - (t - 2) / 8)^3.
    [(0, 1.0), (2, 1.0), (3, 0.1 + 0.9 * 0.669921875), (6, 0.1 + 0.9 * 0.125), (10, 0.1), (12, 0.1), (13, 0.1)],
)
def test_the_schedule(step: int, share: float) -> None:
    assert kept_share(step, 13, 0.1, 2, 3) == pytest.approx(share)


def test_the_schedule_never_jumps() -> None:
    shares = [kept_share(step, 1000, 0.1, 40, 160) for step in range(1001)]
    assert all(0 <= before - after < 0.004 for before, after in pairwise(shares))


def _two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [LoSparseLinear.from_linear(nn.Linear(6, out), torch.randn(out, 1), torch.randn(1, 6)) for out in (6, 4)]
    return nn.Sequential(*layers)


def test_one_threshold_over_all_rows() -> None:
    model = _two_layers()
    scores = {"0.weight": torch.tensor([5.0, 1, 9, 3, 8, 2]), "1.weight": torch.tensor([7.0, 4, 3, 6])}
    prune_rows(model, scores, 0.5)
    parts = sparse_parts(model)
    assert parts["0.weight"].kept.tolist() == [True, False, True, False, True, False]
    assert parts["1.weight"].kept.tolist() == [True, False, False, True]
    assert not parts["0.weight"].weight[1].any()
    # Later scores do not bring a pruned row back, and ties go to the first row.
    prune_rows(model, {"0.weight": torch.full((6,), 100.0), "1.weight": torch.full((4,), 1.0)}, 0.4)
    assert parts["0.weight"].kept.tolist() == [True, False, True, False, True, False]
    assert parts["1.weight"].kept.tolist() == [True, False, False, False]


@pytest.mark.parametrize("aggregate", ["mean", "sum", "max"])
def test_sensitivity_is_weight_times_gradient(aggregate: str) -> None:
    model = _two_layers()
    model(torch.randn(3, 6)).square().sum().backward()
    found = row_scores(sparse_parts(model), "sensitivity", aggregate)
    for index, name in enumerate(("0.weight", "1.weight")):
        weight = model[index].weight_s
        for row in range(len(weight)):
            entries = [abs(s * g) for s, g in zip(weight[row].tolist(), weight.grad[row].tolist(), strict=True)]
            expected = {"mean": sum(entries) / 6, "sum": sum(entries), "max": max(entries)}[aggregate]
            assert float(found[name][row]) == pytest.approx(expected, rel=1e-5)


def _decomposed(name: str) -> Any:
    return decompose_experts(_student(name), LoSparseConfig(rank=2, keep=0.25))


def _run(name: str, folder: Path, callback: SparsificationCallback, resume: str | None = None, **options: Any) -> Any:
    options = {"max_steps": 8} | options
    trainer = _trainer(name, folder, model=_decomposed(name), **options)
    trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("name", ["mixtral", "switch_transformers"])
def test_training_ends_with_the_share_asked_for_and_pruned_rows_stay(name: str, tmp_path: Path) -> None:
    trainer = _run(name, tmp_path, SparsificationCallback(0.25, start=1, end=2), weight_decay=0.1)
    parts = sparse_parts(trainer.model)
    kept, rows = sum(int(part.kept.sum()) for part in parts.values()), sum(p.kept.numel() for p in parts.values())
    assert kept == round(0.25 * rows)
    assert all(not part.weight[~part.kept].any() for part in parts.values())
    shares = [entry["kept_share"] for entry in trainer.state.log_history if "kept_share" in entry]
    expected = [kept_share(step, 8, 0.25, 1, 2) for step in range(1, 9)]
    assert shares == pytest.approx(expected, abs=1 / rows)
    trainer.save_model(tmp_path / "final")
    loaded = type(trainer.model).from_pretrained(tmp_path / "final")
    assert not sparse_parts(loaded)
    batch = _stacked(_rows())
    found, wanted = loaded(**batch).logits, trainer.model.eval()(**batch).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_scores_are_exponential_averages_over_the_steps(tmp_path: Path) -> None:
    seen: list[dict[str, torch.Tensor]] = []

    class Spy(SparsificationCallback):
        def on_pre_optimizer_step(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
            seen.append(
                {
                    name: (part.weight.detach() * part.weight.grad).abs().mean(-1).clone()
                    for name, part in sparse_parts(model).items()
                    if part.weight.grad is not None
                }
            )
            super().on_pre_optimizer_step(*args, model=model, **kwargs)

    spy = Spy(0.25, start=3, end=0, beta=0.6)
    _run("mixtral", tmp_path, spy, max_steps=4, gradient_accumulation_steps=2)
    assert len(seen) == 4
    for name, found in spy.scores.items():
        expected = torch.zeros_like(found)
        for step in seen:
            expected = 0.6 * expected + 0.4 * step[name]
        torch.testing.assert_close(found, expected)


def test_a_killed_run_resumes_exactly(tmp_path: Path) -> None:
    whole = _run("mixtral", tmp_path / "whole", SparsificationCallback(0.25, start=1, end=2))
    checkpoint = str(tmp_path / "whole" / "checkpoint-4")
    again = _run("mixtral", tmp_path / "again", SparsificationCallback(0.25, start=1, end=2), checkpoint)
    expected = whole.model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in again.model.state_dict().items())
    with pytest.raises(ValueError, match=r"another schedule \(keep 0.25 -> 0.5"):
        _run("mixtral", tmp_path / "other", SparsificationCallback(0.5, start=1, end=2), checkpoint)


def test_importance_without_training(tmp_path: Path) -> None:
    model, batches = _decomposed("mixtral"), [_stacked(_rows()[:4]), _stacked(_rows()[4:])]
    before = copy.deepcopy(model.state_dict())
    found, total = zero_shot_importance(model, batches), dict.fromkeys(sparse_parts(model), 0)
    for batch in batches:
        model.zero_grad()
        model(**batch).loss.backward()
        for name, part in sparse_parts(model).items():
            total[name] = total[name] + (part.weight * part.weight.grad).abs().mean(-1) / 2
    for name, score in found.items():
        torch.testing.assert_close(score, total[name].detach())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 1.5}, "keep=1.5"),
        ({"beta": 1.0}, "beta=1.0"),
        ({"importance": "sensitivty"}, "Did you mean 'sensitivity'"),
        ({"aggregate": "median"}, "Unknown aggregate"),
    ],
)
def test_wrong_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparsificationCallback(**options)


def test_a_schedule_longer_than_training_and_a_model_without_s_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leave none of the 8 training steps"):
        _run("mixtral", tmp_path, SparsificationCallback(start=5, end=3))
    trainer = _trainer("mixtral", tmp_path, model=copy.deepcopy(example("mixtral").merged))
    trainer.add_callback(SparsificationCallback())
    with pytest.raises(ValueError, match="call decompose_experts first"):
        trainer.train()
