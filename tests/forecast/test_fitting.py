"""Operations that a repair is told to execute, against those that are counted while one runs."""

from collections import Counter
from typing import Any

import pytest
import torch
from families import build
from torch.utils._python_dispatch import TorchDispatchMode

from hf_mcsmoe import MergeConfig, RepairConfig, collect_statistics, merge_experts, plan_merge, repair_experts
from hf_mcsmoe.forecast import fitting
from hf_mcsmoe.forecast.fitting import TRIALS, Rows, joint_work, local_work, refit_work
from hf_mcsmoe.forecast.result import result_by_hand
from hf_mcsmoe.forecast.run import run_of
from hf_mcsmoe.forecast.sizes import sizes_of
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.repair import repair as repairing

ROWS, LENGTH, STEPS = 10, 48, 30


class Counted(TorchDispatchMode):
    """Counts operations of products by dtype, and decompositions, as they are executed."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[torch.dtype] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, tensors = func.overloadpacket.__name__, [value for value in args if isinstance(value, torch.Tensor)]
        if name in ("mm", "addmm", "addmm_"):
            one, other = tensors[-2:]
            self.operations[one.dtype] += 2 * one.shape[0] * one.shape[1] * other.shape[1]
        elif name == "linalg_cholesky_ex":
            self.operations[tensors[0].dtype] += tensors[0].shape[0] ** 3 // 3
        elif name == "cholesky_solve":
            self.operations[tensors[0].dtype] += 2 * tensors[0].shape[1] * tensors[1].shape[0] ** 2
        self.calls[name] += 1
        return func(*args, **(kwargs or {}))


def _repaired(name: str, method: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Counted, Rows, int]:
    """Return what the repair of half of a model's experts executes, its rows by sizes alone, and its layers."""
    model, config = build(name), MergeConfig(experts=4, budget="uniform")
    tokens = torch.randint(3, 60, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in tokens.split(5)]
    merged = merge_experts(model, plan_merge(model, collect_statistics(model, batches), config))
    counted, repair = Counted(), repairing.repair_layer

    def counting(*given: Any) -> Any:
        with counted:
            return repair(*given)

    monkeypatch.setattr(repairing, "repair_layer", counting)
    repair_experts(merged, model, batches, RepairConfig(method=method, steps=STEPS))
    layers = Layers.of(model)
    run = run_of(layers, result_by_hand(layers, config), config, repair=method, rows=ROWS, judged=0, length=LENGTH)
    return counted, Rows.of(sizes_of(layers), run, run.kept), len(layers)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_a_refit_executes_what_is_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counted, rows, layers = _repaired(name, "refit", monkeypatch)
    told = refit_work(rows).times(layers)
    assert counted.operations[torch.float32] == pytest.approx(told.experts + told.single, rel=0.15)
    assert counted.operations[torch.float64] == pytest.approx(told.double, rel=0.2)
    assert counted.calls["_linalg_eigh"] == pytest.approx(told.decompositions, rel=0.25)


@pytest.mark.parametrize("method", ["joint", "local"])
def test_a_fit_of_all_experts_together_executes_what_is_told(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counted, rows, layers = _repaired("qwen3_moe", method, monkeypatch)
    number = counted.calls["linalg_cholesky_ex"] - (layers if method == "joint" else 0)  # the last is no ridge to try
    tried: Any = number / layers / TRIALS
    one = joint_work(rows, tried=tried) if method == "joint" else local_work(rows, tried=tried, steps=STEPS)
    told = one.times(layers)
    assert counted.operations[torch.float32] == pytest.approx(told.experts + told.single, rel=0.2)
    assert counted.operations[torch.float64] == pytest.approx(told.double, rel=0.05)


def test_what_does_not_fit_into_memory_is_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, config = Layers.of(build("qwen3_moe")), MergeConfig(experts=4)
    run = run_of(layers, result_by_hand(layers, config), config, repair="refit", rows=ROWS, judged=0, length=LENGTH)
    rows = Rows.of(sizes_of(layers), run, run.kept)
    dense = refit_work(rows), joint_work(rows)
    monkeypatch.setattr(fitting, "MEMORY_LIMIT", 1)
    few = refit_work(rows), joint_work(rows)
    assert few[0].decompositions == 0 < dense[0].decompositions
    assert few[1].single != dense[1].single
    # A step goes over all rows, in a fit of each expert twice, forth and back, for each ridge of each trial.
    products = 2 * rows.all * rows.sizes.hidden_size * rows.sizes.intermediate_size
    assert few[0].double > fitting.STEPS * fitting.RIDGES * TRIALS * 2 * products
    assert few[1].single > fitting.STEPS * fitting.TRIED * TRIALS * 2 * products


def test_nothing_is_fitted_without_a_repair() -> None:
    layers, config = Layers.of(build("qwen3_moe")), MergeConfig(experts=4)
    run = run_of(layers, result_by_hand(layers, config), config)
    assert fitting.work_of(sizes_of(layers), run) == fitting.Work()
