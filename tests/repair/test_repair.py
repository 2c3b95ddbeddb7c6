"""Repair of merged layers: the closed form against least squares, every layout, the teacher untouched, bad input."""

import copy
from typing import Any

import pytest
import torch
from families import build
from helpers import batches, groups_of, logits, state
from layouts import LAYOUTS
from merged import example
from transformers import PreTrainedModel

from hf_mcsmoe import (
    LoSparseConfig,
    MergeConfig,
    RepairConfig,
    collect_statistics,
    compact,
    decompose_experts,
    merge_experts,
    moe_layers,
    plan_merge,
    repair_experts,
)
from hf_mcsmoe.modeling.losparse_mcsmoe import low_rank_modules, sparse_parts
from hf_mcsmoe.repair.least_squares import HELD_OUT, refit

NAMES = sorted(LAYOUTS)


def _error(model: PreTrainedModel, reference: PreTrainedModel, batch: Any) -> float:
    return float((logits(model, batch) - logits(reference, batch)).norm())


def _rows(tokens: int, width: int, out: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator)
    target = hidden @ torch.randn(width, out, generator=generator) + 0.1 * torch.randn(
        tokens, out, generator=generator
    )
    return hidden, target, torch.arange(tokens) >= tokens - tokens // 5


def test_the_record_holds_the_errors_of_each_layer() -> None:
    case = example("mixtral")
    report = repair_experts(copy.deepcopy(case.merged), case.base, batches("mixtral", case.base))
    errors = report.step().figures["relative_error"]
    assert list(errors) == [layer.name for layer in moe_layers(case.merged) if layer.merged]
    assert {name: (item["before"], item["after"]) for name, item in errors.items()} == {
        name: (layer.before, layer.after) for name, layer in report.layers.items()
    }
    assert all(0 < item["after"] <= item["before"] for item in errors.values())


@pytest.mark.parametrize("memory_limit", [10**9, 1000], ids=["direct", "conjugate gradients"])
def test_the_refit_is_least_squares_with_a_ridge_towards_the_old_weights(memory_limit: int) -> None:
    hidden, target, held_out = _rows(200, 12, 5)
    part = torch.where(held_out, HELD_OUT, 0)
    start = torch.randn(5, 12, generator=torch.Generator().manual_seed(1)).double()
    found = refit(
        lambda: iter([(hidden[:90], target[:90], part[:90]), (hidden[90:], target[90:], part[90:])]),
        start,
        (0.01,),
        memory_limit=memory_limit,
    )
    # The ridge as further rows: sqrt(ridge * mean diagonal) (W - W0) = 0, over all the tokens in the end.
    used = hidden.double()
    scale = (0.01 * (used.T @ used).diagonal().mean()).sqrt()
    stacked = torch.cat([used, scale * torch.eye(12).double()])
    goal = torch.cat([target.double(), scale * start.T])
    expected = torch.linalg.lstsq(stacked, goal).solution.T
    assert float((found.weight - expected).norm() / expected.norm()) < 1e-4


def test_too_few_tokens_keep_the_old_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, target = torch.randn(6, 12, generator=generator), torch.randn(6, 5, generator=generator)
    start = torch.zeros(5, 12).double()
    found = refit(
        lambda: iter([(hidden, target, torch.where(torch.arange(6) >= 5, HELD_OUT, 0))]),
        start,
        (1e-4,),
        memory_limit=10**9,
    )
    assert found.ridge is None
    assert torch.equal(found.weight, start)


def _alike(name: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Return a model whose experts differ in their output matrices alone, and what merging pairs of them gives."""
    model = build(name)
    for layer in moe_layers(model):
        experts = [LAYOUTS[name].before(layer.container, index) for index in range(layer.num_experts)]
        for other in experts[1:]:
            for role, value in other.items():
                if not role.startswith("down"):
                    value.copy_(experts[0][role])
    sizes = {layer.num_experts for layer in moe_layers(model)}
    assert len(sizes) == 1
    half = sizes.pop() // 2
    grouping = groups_of([index % half for index in range(2 * half)], list(range(half)))
    config = MergeConfig(experts=half, budget="uniform", grouping=grouping, alignment="none", weighting="dominant")
    return model, merge_experts(model, plan_merge(model, collect_statistics(model, batches(name, model)), config))


@pytest.mark.parametrize("name", ["mixtral", "nemotron_h", "gpt_oss", "switch_transformers", "llama4"])
def test_the_refit_brings_the_merged_model_nearer(name: str) -> None:
    model, merged = _alike(name)
    data = batches(name, model, number=8)
    before = _error(merged, model, data[0])
    report = repair_experts(merged, model, data)
    assert _error(merged, model, data[0]) < 0.9 * before
    assert all(layer.after < layer.before for layer in report.layers.values())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["refit", "local"])
def test_every_layout(method: str, name: str) -> None:
    case = example(name)
    student, teacher = copy.deepcopy(case.merged), copy.deepcopy(case.base)
    before = state(teacher)
    data = batches(name, case.base, number=8)
    report = repair_experts(student, teacher, data, RepairConfig(method=method, steps=25))
    assert state(teacher) == before
    assert report.layers
    assert any(layer.after < layer.before for layer in report.layers.values())
    routers = [layer.router.state_dict() for layer in moe_layers(student)]
    assert all(
        torch.equal(value, old[key])
        for new, old in zip(routers, [layer.router.state_dict() for layer in moe_layers(case.merged)], strict=True)
        for key, value in new.items()
    )


@pytest.mark.parametrize("form", ["training", "compact"])
@pytest.mark.parametrize("name", NAMES)
def test_u_and_s_of_w_out_are_refitted_to_the_original(name: str, form: str) -> None:
    case = example(name)
    data = batches(name, case.base, number=8)
    student = decompose_experts(copy.deepcopy(case.merged), LoSparseConfig(rank=2, keep=0.25), data, prune=True)
    for _, module in low_rank_modules(student):  # so that there is something to repair
        for part in ("u", "s"):
            getattr(module, f"down_proj_{part}").data.mul_(0.5)
    if form == "compact":
        compact(student)
    old = {key: value.clone() for key, value in student.state_dict().items()}
    report = repair_experts(student, case.base, data)
    assert all(layer.after < 0.99 * layer.before for layer in report.layers.values())
    changed = {
        key.rpartition(".")[2] for key, value in student.state_dict().items() if not torch.equal(value, old[key])
    }
    assert changed <= {"down_proj_u", "down_proj_s", "down_proj_bias"}
    assert {"down_proj_u", "down_proj_s"} <= changed
    for part in sparse_parts(student).values():
        assert not part.weight[~part.kept].any(), "a pruned column came back"


def test_experts_in_low_rank_are_repaired_by_training_them() -> None:
    case = example("mixtral")
    data = batches("mixtral", case.base, number=4)
    student = decompose_experts(copy.deepcopy(case.merged), LoSparseConfig(rank=2, keep=0.25), data, prune=True)
    compact(student)
    shapes = {key: value.shape for key, value in student.state_dict().items()}
    report = repair_experts(student, case.base, data, RepairConfig(method="local", steps=50))
    assert any(layer.after < 0.99 * layer.before for layer in report.layers.values())
    assert {key: value.shape for key, value in student.state_dict().items()} == shapes


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda merged, base, data: repair_experts(base, base, data), "no merged layer"),
        (lambda merged, base, data: repair_experts(merged, base, []), "calibration set is empty"),
        (lambda merged, base, data: repair_experts(merged, build("nemotron_h"), data), "another model"),
        (lambda merged, base, data: RepairConfig(method="refitt"), "Did you mean 'refit'"),
        (lambda merged, base, data: RepairConfig(steps=0), "positive whole number"),
    ],
)
def test_bad_input(attempt: Any, message: str) -> None:
    case = example("mixtral")
    with pytest.raises(ValueError, match=message):
        attempt(copy.deepcopy(case.merged), case.base, batches("mixtral", case.base))
