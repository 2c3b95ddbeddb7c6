"""Both solvers find assignments of the same cost, of random, related and tied costs."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from hf_mcsmoe.methods import assignment
from hf_mcsmoe.methods.assignment import WIDE, assigned, assignment_bytes


def _cost(kind: str, width: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    one = torch.randn(width, 16, generator=draw)
    if kind == "related":
        other = one[torch.randperm(width, generator=draw)] + 0.5 * torch.randn(width, 16, generator=draw)
        return -(one @ other.T)
    if kind == "tied":  # few values, and rows and columns that are the same
        return torch.randint(3, (width, width), generator=draw).float()[torch.arange(width) // 2]
    return torch.zeros(width, width) if kind == "all tied" else torch.randn(width, width, generator=draw)


@pytest.mark.parametrize("kind", ["random", "related", "tied", "all tied"])
@pytest.mark.parametrize("width", [1, 2, 7, 150])
def test_lapx_finds_the_cost_that_scipy_finds(kind: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lap")
    monkeypatch.setattr(assignment, "WIDE", 1)
    cost = _cost(kind, width)
    rows, columns = linear_sum_assignment(cost.numpy())
    found = assigned(cost)
    assert found.dtype == torch.int64
    assert sorted(found.tolist()) == list(range(width))
    expected = cost.double().numpy()[rows, columns].sum()
    assert float(cost.double()[torch.arange(width), found].sum()) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_lapx_is_for_wide_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    lap, calls = pytest.importorskip("lap"), []

    def lapjv(cost: np.ndarray, return_cost: bool) -> tuple[np.ndarray, np.ndarray]:
        calls.append(cost.shape)
        return np.arange(len(cost), dtype=np.int32), np.arange(len(cost), dtype=np.int32)

    monkeypatch.setattr(lap, "lapjv", lapjv)
    wide = torch.zeros(1, 1).expand(WIDE, WIDE)
    assigned(wide)
    assert calls == [(WIDE, WIDE)]
    assigned(torch.zeros(8, 8))
    monkeypatch.setattr(assignment, "HAS_LAPX", False)
    monkeypatch.setattr(assignment, "linear_sum_assignment", lambda cost: (None, np.arange(len(cost))))
    assert assigned(wide).tolist() == list(range(WIDE))
    assert len(calls) == 1


def test_costs_that_are_not_finite_are_refused() -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not finite"):
            assigned(torch.full((3, 3), value))


def test_an_assignment_takes_its_costs_twice() -> None:
    assert assignment_bytes(14336) == pytest.approx(2.47e9, rel=1e-2)
