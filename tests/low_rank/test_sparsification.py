"""Pruning rows of S: the schedule, scores, one threshold over all weights, and the callback in a Trainer."""

import copy
import shutil
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
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_mcsmoe import (
    LoSparseConfig,
    LoSparseLinear,
    SparsificationCallback,
    compact,
    decompose_experts,
)
from hf_mcsmoe.low_rank import importance, pruning
from hf_mcsmoe.low_rank.importance import RowAverages, row_scores
from hf_mcsmoe.low_rank.pruning import kept_share, prune_rows, zero_shot_importance
from hf_mcsmoe.modeling.losparse_mcsmoe import sparse_parts


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


@pytest.mark.parametrize("uncertainty", [False, True])
def test_a_killed_run_resumes_exactly(uncertainty: bool, tmp_path: Path) -> None:
    def pruning(keep: float = 0.25) -> SparsificationCallback:
        return SparsificationCallback(keep, start=1, end=2, uncertainty=uncertainty)

    whole = _run("mixtral", tmp_path / "whole", pruning())
    checkpoint = str(tmp_path / "whole" / "checkpoint-4")
    again = _run("mixtral", tmp_path / "again", pruning(), checkpoint)
    expected = whole.model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in again.model.state_dict().items())
    with pytest.raises(ValueError, match=r"another schedule \(keep 0.25 -> 0.5"):
        _run("mixtral", tmp_path / "other", pruning(0.5), checkpoint)
    other = SparsificationCallback(0.25, start=1, end=2, uncertainty=not uncertainty)
    with pytest.raises(ValueError, match=r"another schedule \(beta2"):
        _run("mixtral", tmp_path / "other", other, checkpoint)


def test_a_run_that_prunes_does_not_resume_without_pruning(tmp_path: Path) -> None:
    _run("mixtral", tmp_path, SparsificationCallback(0.25, start=1, end=2), max_steps=4)
    for resume in (True, str(tmp_path / "checkpoint-2")):
        trainer = _trainer("mixtral", tmp_path, model=_decomposed("mixtral"), max_steps=4)
        with pytest.raises(ValueError, match=r"checkpoint-\d is of a run that prunes S.*SparsificationCallback"):
            trainer.train(resume_from_checkpoint=resume)


@pytest.mark.parametrize("plain", [False, True], ids=["ours", "plain trainer"])
@pytest.mark.parametrize(("decomposed", "pruned"), [(0.1, 0.5), (0.5, 0.1)])
def test_the_rows_that_are_pruned_to_are_those_that_are_saved(
    decomposed: float, pruned: float, plain: bool, tmp_path: Path
) -> None:
    model = decompose_experts(_student("mixtral"), LoSparseConfig(rank=2, keep=decomposed))
    trainer = _trainer("mixtral", tmp_path / "run", model=model, max_steps=4, save_strategy="no")
    if plain:
        trainer = Trainer(model, args=trainer.args, train_dataset=_rows())
    trainer.add_callback(SparsificationCallback(pruned, start=1, end=1))
    trainer.train()
    kept = {name: part.kept.flatten().nonzero().flatten() for name, part in sparse_parts(trainer.model).items()}
    rows = sum(part.kept.numel() for part in sparse_parts(trainer.model).values())
    trainer.save_model(tmp_path / "saved")
    written = load_file(tmp_path / "saved" / "model.safetensors")
    assert sum(map(len, kept.values())) == round(pruned * rows)
    for name, part in sparse_parts(trainer.model).items():
        matrix = part.weight.detach().reshape(-1, part.weight.shape[-1])
        assert torch.equal(written[f"{name}_s"], matrix[kept[name]])
        assert torch.equal(written[f"{name}_rows"], (kept[name] % part.kept.shape[-1]).int())


def test_uncertainty_multiplies_the_importance_of_entries() -> None:
    generator = torch.Generator().manual_seed(0)
    model, averages = _two_layers(), RowAverages("sensitivity", "mean", beta=0.6, beta2=0.8)
    parts = sparse_parts(model)
    mean = {name: [[0.0] * 6 for _ in part.weight] for name, part in parts.items()}
    spread = copy.deepcopy(mean)
    for _ in range(3):
        for name, part in parts.items():
            part.weight.grad = torch.randn(part.weight.shape, generator=generator)
            entries = zip(part.weight.tolist(), part.weight.grad.tolist(), strict=True)
            for row, (weights, gradients) in enumerate(entries):
                for place, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
                    now, old = abs(weight * gradient), mean[name][row][place]
                    new = 0.6 * old + 0.4 * now
                    mean[name][row][place] = new
                    spread[name][row][place] = 0.8 * spread[name][row][place] + 0.2 * abs(now - new)
        averages.update(parts)
    for name in parts:
        expected = [
            sum(i * u for i, u in zip(importance, uncertainty, strict=True)) / 6
            for importance, uncertainty in zip(mean[name], spread[name], strict=True)
        ]
        torch.testing.assert_close(averages.scores[name], torch.tensor(expected), rtol=1e-5, atol=0)
    # The order of rows by these scores is not that by importance alone, or the option would mean nothing.
    plain = RowAverages("sensitivity", "mean", beta=0.6)
    plain.update(parts)
    assert not torch.allclose(plain.scores["0.weight"], averages.scores["0.weight"])


@pytest.mark.parametrize("beta2", [None, 0.9])
def test_a_gradient_that_is_not_finite_changes_no_average(beta2: float | None) -> None:
    model, averages = _two_layers(), RowAverages("sensitivity", "max", beta=0.5, beta2=beta2)
    parts = sparse_parts(model)
    model(torch.randn(3, 6)).square().sum().backward()
    averages.update(parts)
    before = {name: score.clone() for name, score in averages.scores.items()}
    for value in (torch.inf, torch.nan):
        for part in parts.values():
            part.weight.grad.fill_(value)
        averages.update(parts)
    for name, score in averages.scores.items():
        torch.testing.assert_close(score, before[name])


def test_weights_too_large_for_one_piece_are_scored_by_their_rows_too() -> None:
    width = importance.CHUNK // 2  # two rows at a time
    layer = LoSparseLinear.from_linear(nn.Linear(width, 5), torch.randn(5, 1), torch.randn(1, width))
    layer(torch.randn(3, width)).square().sum().backward()
    (score,) = row_scores(sparse_parts(nn.Sequential(layer)), "sensitivity").values()
    torch.testing.assert_close(score, (layer.weight_s * layer.weight_s.grad).abs().mean(1))


def test_all_processes_prune_what_the_first_one_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sent = _two_layers(), []

    def broadcast(chosen: torch.Tensor, src: int) -> None:
        sent.append((chosen.clone(), src))
        chosen.copy_(torch.tensor([1, 1, 0, 0, 0, 0, 1, 1, 0, 0]))

    for name, value in {"is_initialized": lambda: True, "get_world_size": lambda: 2, "broadcast": broadcast}.items():
        monkeypatch.setattr(pruning.dist, name, value)
    scores = {"0.weight": torch.arange(6.0), "1.weight": torch.arange(4.0)}
    prune_rows(model, scores, 0.4)
    parts = sparse_parts(model)
    assert parts["0.weight"].kept.tolist() == [True, True, False, False, False, False]
    assert parts["1.weight"].kept.tolist() == [True, True, False, False]
    prune_rows(model, scores, 0.4)  # nothing left to choose, nothing to send
    assert [(tensor.numel(), src) for tensor, src in sent] == [(10, 0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neither_momentum_nor_weight_decay_revives_a_row(dtype: torch.dtype, tmp_path: Path) -> None:
    gradients = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
            for part in sparse_parts(model).values():
                gradients.append(part.weight.grad[~part.kept])
                assert not part.weight[~part.kept].any()

    # Scheduled to prune half of the steps and then to go on for as many, with momentum left over.
    trainer = _trainer(
        "mixtral",
        tmp_path,
        model=_decomposed("mixtral").to(dtype),
        max_steps=10,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        max_grad_norm=0.1,
        weight_decay=0.1,
        bf16=dtype == torch.bfloat16,
        save_strategy="no",
    )
    for callback in (SparsificationCallback(0.25, start=1, end=5), Watch()):
        trainer.add_callback(callback)
    trainer.train()
    parts = sparse_parts(trainer.model)
    assert sum(len(gradient) for gradient in gradients) > 0
    assert not any(gradient.any() for gradient in gradients)
    kept, rows = sum(int(part.kept.sum()) for part in parts.values()), sum(p.kept.numel() for p in parts.values())
    assert kept == round(0.25 * rows)
    assert all(not part.weight[~part.kept].any() for part in parts.values())
    assert all(part.weight.dtype == dtype for part in parts.values())


def _plain(folder: Path, max_steps: int = 4, **options: Any) -> Trainer:
    """Return a Trainer of the library, which tells its callbacks nothing of where it resumes from."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=max_steps,
        save_steps=2,
        logging_steps=1,
        per_device_train_batch_size=4,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    pruning = SparsificationCallback(0.25, start=1, end=1)
    return Trainer(_decomposed("mixtral"), args=arguments, train_dataset=_rows(), callbacks=[pruning])


def _same(ours: Trainer, expected: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, expected[key]) for key, value in ours.model.state_dict().items())


def test_a_plain_trainer_resumes_where_it_finds_its_own_checkpoint(tmp_path: Path) -> None:
    first = _plain(tmp_path / "first")
    first.train()
    expected, checkpoint = first.model.state_dict(), str(tmp_path / "first" / "checkpoint-2")
    shutil.rmtree(tmp_path / "first" / "checkpoint-4")
    again = _plain(tmp_path / "first")
    again.train(resume_from_checkpoint=True)
    assert _same(again, expected)
    elsewhere = _plain(tmp_path / "elsewhere", resume_from_checkpoint=checkpoint)
    elsewhere.train(resume_from_checkpoint=checkpoint)
    assert _same(elsewhere, expected)
    with pytest.raises(ValueError, match="name it in `resume_from_checkpoint` of the training arguments"):
        _plain(tmp_path / "unknown").train(resume_from_checkpoint=checkpoint)
    # Another run's checkpoint of the same step lies where ours might.
    _plain(tmp_path / "other", learning_rate=1e-2).train()
    with pytest.raises(ValueError, match="Found no checkpoint of this run at step 2"):
        _plain(tmp_path / "other").train(resume_from_checkpoint=checkpoint)
    (tmp_path / "first" / "checkpoint-2" / pruning.OPTIONS_FILE).unlink()
    with pytest.raises(ValueError, match="not saved with a SparsificationCallback"):
        _plain(tmp_path / "first", resume_from_checkpoint=checkpoint).train(resume_from_checkpoint=checkpoint)


def test_a_schedule_in_steps_is_that_in_shares() -> None:
    steps, shares = SparsificationCallback(start=2, end=4), SparsificationCallback(start=0.1, end=0.2)
    assert steps.options(20) == shares.options(20)
    assert SparsificationCallback(start=1, end=0).options(20)["start"] == 1
    assert SparsificationCallback(start=1.0, end=0.0).options(20)["start"] == 20


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


def test_importance_of_a_frozen_s() -> None:
    model, batches = _decomposed("mixtral").requires_grad_(False), [_stacked(_rows())]
    with pytest.raises(ValueError, match="importance='sensitivity' needs the gradient of S, which is frozen"):
        zero_shot_importance(model, batches)
    found = zero_shot_importance(model, batches, importance="magnitude")
    for name, part in sparse_parts(model).items():
        torch.testing.assert_close(found[name], part.weight.abs().mean(-1))


@pytest.mark.parametrize("name", ["mixtral", "switch_transformers"])
def test_rows_by_importance_without_training_make_a_compact_model(name: str) -> None:
    model, data = _decomposed(name), [_stacked(_rows()[:4]), _stacked(_rows()[4:])]
    rows = sum(part.kept.numel() for part in sparse_parts(model).values())
    scores = zero_shot_importance(model, data)
    prune_rows(model, scores, 0.25)
    threshold = torch.cat([score.flatten() for score in scores.values()]).sort(descending=True).values
    for path, part in sparse_parts(model).items():
        assert torch.equal(part.kept, scores[path] >= threshold[round(0.25 * rows) - 1])
    expected = model(**data[0]).logits
    torch.testing.assert_close(compact(model)(**data[0]).logits, expected, atol=1e-5, rtol=1e-4)
    entries = [entry for layer in model.config.mcsmoe["layers"].values() for entry in layer["low_rank"].values()]
    assert sum(sum(entry["kept_rows"]) for entry in entries) == round(0.25 * rows)


@pytest.mark.parametrize(
    ("batches", "message"),
    [([], "calibration set is empty"), ([{"input_ids": torch.tensor([[5, 6]])}], "needs labels")],
)
def test_importance_needs_batches_with_labels(batches: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        zero_shot_importance(_decomposed("mixtral"), batches)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 1.5}, "keep=1.5"),
        ({"keep": -0.1}, "keep=-0.1"),
        ({"beta": 1.0}, "beta=1.0"),
        ({"beta2": -0.5}, "beta2=-0.5"),
        ({"start": -1}, "start=-1 must be a number of steps"),
        ({"end": -0.1}, "end=-0.1 must be a number of steps"),
        ({"start": 1.5}, "start=1.5 must be a number of steps"),
        ({"start": True}, "start=True must be a finite number"),
        ({"importance": "sensitivty"}, "Did you mean 'sensitivity'"),
        ({"aggregate": "median"}, "Unknown aggregate"),
    ],
)
def test_wrong_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparsificationCallback(**options)


def test_a_schedule_longer_than_training_and_a_model_without_s_are_refused(tmp_path: Path) -> None:
    for start, end in ((5, 3), (1.0, 0), (0.5, 0.5)):
        with pytest.raises(ValueError, match="leave none of the 8 training steps"):
            _run("mixtral", tmp_path, SparsificationCallback(start=start, end=end))
    trainer = _trainer("mixtral", tmp_path, model=copy.deepcopy(example("mixtral").merged))
    trainer.add_callback(SparsificationCallback())
    with pytest.raises(ValueError, match="call decompose_experts first"):
        trainer.train()


def test_rows_of_a_frozen_s_cannot_be_scored_by_gradients(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs the gradient of S, which is frozen"):
        _run("mixtral", tmp_path, SparsificationCallback(0.25, start=1, end=2), train_parts="routers")
    callback = SparsificationCallback(0.25, start=1, end=2, importance="magnitude")
    trainer = _run("mixtral", tmp_path, callback, train_parts="routers")
    parts = sparse_parts(trainer.model).values()
    assert sum(int(part.kept.sum()) for part in parts) == round(0.25 * sum(part.kept.numel() for part in parts))
