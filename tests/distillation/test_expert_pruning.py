"""Experts pruned while a model learns: which go when, what the optimizer keeps, and runs that go on."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from distilled import make_rows, make_trainer, stacked
from families import build
from helpers import batches, logits
from transformers import AutoModelForCausalLM, TrainerCallback

from hf_mcsmoe import ExpertPruningCallback, moe_layers, prepare_pruning
from hf_mcsmoe.attached import record_of
from hf_mcsmoe.distillation.expert_pruning import experts_left
from hf_mcsmoe.distillation.pruned_students import prune_layer
from hf_mcsmoe.modeling.pruned_mcsmoe import cut_of


def _prepared(name: str = "mixtral") -> Any:
    return prepare_pruning(copy.deepcopy(build(name)))


def _trainer(folder: Path, callback: ExpertPruningCallback, name: str = "mixtral", **options: Any) -> Any:
    given = {"max_steps": 6, "warmup_steps": 0, "freeze_routers": False, "save_strategy": "no", **options}
    model = given.pop("model", None)
    return make_trainer(
        name,
        folder,
        model=_prepared(name) if model is None else model,
        teacher=build(name),
        callbacks=[callback],
        **given,
    )


@pytest.mark.parametrize(
    "name", ["mixtral", *(pytest.param(x, marks=pytest.mark.slow) for x in ("deepseek_v3", "dbrx"))]
)
def test_a_prepared_model_computes_what_it_did(name: str) -> None:
    before = build(name)
    model = _prepared(name)
    batch = batches(name, before)[0]
    torch.testing.assert_close(logits(model, batch), logits(before, batch), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="compressed already"):
        prepare_pruning(model)


def test_experts_go_by_the_cubic_schedule() -> None:
    found = [experts_left(step, 10, (8, 2), 2, 3) for step in range(11)]
    # From the third step on 8 - 6 (1 - (1 - (t - 2) / 5)^3), rounded up.
    expected = [8, 8, 8, *(-(-(2 + 6 * (1 - (t - 2) / 5) ** 3) // 1) for t in (3, 4, 5, 6)), 2, 2, 2, 2]
    assert found == expected
    assert [experts_left(step, 10, (8, 4), 0, 5, unit=4) for step in (0, 1, 4, 5)] == [8, 8, 8, 4]


class _Watch:
    """An oracle of counts: the picks of each router in training, by a hook of the test's own."""

    def __init__(self, model: Any) -> None:
        self.model, self.gates = model, {}
        self.handles: list[Any] = []
        self.renew()

    def renew(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.gates = {layer.name: torch.zeros(layer.num_experts) for layer in moe_layers(self.model)}
        self.handles = [
            layer.router.register_forward_hook(self._counter(layer.name)) for layer in moe_layers(self.model)
        ]

    def _counter(self, name: str) -> Any:
        def count(router: Any, arguments: Any, output: Any) -> None:
            _, weights, index = output
            mask = self.model.rows_seen.flatten()
            for token in range(len(index)):
                for pick in range(index.shape[1]):
                    if router.training and mask[token]:
                        self.gates[name][index[token, pick]] += float(weights[token, pick].detach())

        return count


def test_the_least_used_experts_of_the_training_batches_go(tmp_path: Path) -> None:
    callback = ExpertPruningCallback(3, start=1, end=1)
    trainer = _trainer(tmp_path, callback, rows=make_rows(padding=3), max_steps=4)
    model = trainer.student
    model.register_forward_pre_hook(
        lambda module, arguments, keywords: setattr(module, "rows_seen", keywords["attention_mask"]), with_kwargs=True
    )
    watch, seen, step_end = _Watch(model), [], callback.on_step_end

    def compared(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        before = {layer.name: list(layer.kept) for layer in moe_layers(model)}
        step_end(args, state, control, **kwargs)
        for layer in moe_layers(model):
            left = experts_left(state.global_step, 4, (8, 3), 1, 1)
            best = watch.gates[layer.name].argsort(descending=True, stable=True)[:left].sort().values
            assert list(layer.kept) == [before[layer.name][place] for place in best.tolist()]
            assert layer.num_experts == left == len(layer.router.weight)
        if {len(kept) for kept in before.values()} != {left}:
            watch.renew()
        seen.append(left)

    callback.on_step_end = compared  # type: ignore[method-assign]
    trainer.train()
    assert seen == [8, 4, 3, 3]
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert trained == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}


def test_the_optimizer_goes_on_with_what_it_knows_of_those_that_stay() -> None:
    model = _prepared().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters())
    model(**stacked(make_rows())).loss.backward()
    optimizer.step()
    layer = moe_layers(model)[0]
    moments = optimizer.state[layer.container.down_proj]["exp_avg"].clone()
    rows = optimizer.state[layer.router.weight]["exp_avg_sq"].clone()
    weights = layer.container.down_proj.detach().clone()
    prune_layer(model, layer.name, [1, 2, 6], optimizer)
    prune_layer(model, layer.name, [0, 2], optimizer)
    after = moe_layers(model)[0]
    assert list(after.kept) == [1, 6]
    assert cut_of(model, layer.name).num_cut == 6
    assert torch.equal(after.container.down_proj, weights[[1, 6]])
    assert torch.equal(optimizer.state[after.container.down_proj]["exp_avg"], moments[[1, 6]])
    assert torch.equal(optimizer.state[after.router.weight]["exp_avg_sq"], rows[[1, 6]])
    assert len(optimizer.state) == len(list(model.parameters()))
    model(**stacked(make_rows())).loss.backward()
    optimizer.step()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "switch_transformers"])
def test_a_run_that_was_stopped_goes_on_and_ends_alike(name: str, tmp_path: Path) -> None:
    results = {}
    for folder, steps in (("whole", [None]), ("parts", [3, None])):
        for stop in steps:
            callback = ExpertPruningCallback(0.25 if name == "switch_transformers" else 3, start=1, end=1)
            trainer = _trainer(tmp_path / folder, callback, name, save_strategy="steps", seed=3)
            if stop:
                trainer.add_callback(_Stop(stop))
            trainer.train(resume_from_checkpoint=True if folder == "parts" and not stop else None)
        results[folder] = trainer
    ours, theirs = (results[folder].student.state_dict() for folder in ("parts", "whole"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    trainer = results["parts"]
    trainer.save_model(str(tmp_path / "saved"))
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    kept = {layer.original_name: list(layer.kept) for layer in moe_layers(trainer.student)}
    plan = record_of(trainer.student).plan
    assert {layer: item["kept"] for layer, item in plan["layers"].items()} == kept
    if name == "mixtral":
        assert (config["model_type"], config["num_local_experts"]) == ("mixtral", 3)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        batch = batches(name, loaded)[0]
        torch.testing.assert_close(logits(loaded, batch), logits(trainer.student.eval(), batch), atol=1e-5, rtol=1e-5)
    assert "Task-specific pruning" in (tmp_path / "saved" / "README.md").read_text()


class _Stop(TrainerCallback):
    """Ends a training early."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def test_what_cannot_be_pruned_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'router_norm_change' reads"):
        ExpertPruningCallback(saliency="router_norm_change")
    with pytest.raises(ValueError, match="reads 'taylor'"):
        ExpertPruningCallback(saliency="taylor")
    with pytest.raises(ValueError, match="every=0"):
        ExpertPruningCallback(every=0)
    with pytest.raises(ValueError, match="leave none of the 6 training steps"):
        _trainer(tmp_path, ExpertPruningCallback(start=3, end=3)).train()
    with pytest.raises(ValueError, match="needs 2 of them at least"):
        _trainer(tmp_path, ExpertPruningCallback(1, start=1, end=1)).train()
    with pytest.raises(ValueError, match="prepare_pruning was called for"):
        _trainer(
            tmp_path, ExpertPruningCallback(), model=copy.deepcopy(build("mixtral")), allow_uncompressed=True
        ).train()
