"""Refits equal least squares over stacked rows, solved as a whole; every other path gives the same answer."""

import pytest
import torch
from helpers import relative_error

from hf_mcsmoe.repair.least_squares import (
    HELD_OUT,
    ExpertFit,
    NormalEquations,
    Rows,
    RowSource,
    best_ridge,
    mean_shift,
    refit,
)

LIMIT = 10**9
F, D, TOKENS = 12, 5, 200


def _rows(noise: float = 0.1, tokens: int = TOKENS, seed: int = 0, scale: float = 1.0) -> tuple[Rows, torch.Tensor]:
    """Make rows whose targets are a linear map of their hidden states plus noise; returns them and the map."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, F, generator=generator, dtype=torch.float64) * scale
    weight = torch.randn(D, F, generator=generator, dtype=torch.float64)
    target = hidden @ weight.T + noise * torch.randn(tokens, D, generator=generator, dtype=torch.float64)
    return (hidden, target, torch.arange(tokens) % 5 == 4), weight


def _source(rows: Rows, size: int = 17, domain: torch.Tensor | None = None) -> RowSource:
    """Return the rows some at a time, with their parts: held out, or else the data set."""
    hidden, target, held_out = rows
    parts = (torch.zeros(len(hidden), dtype=torch.int64) if domain is None else domain).masked_fill(held_out, HELD_OUT)
    return lambda: zip(*(tensor.split(size) for tensor in (hidden, target, parts)), strict=True)


def _stacked(hidden: torch.Tensor, target: torch.Tensor, start: torch.Tensor, ridge: float) -> torch.Tensor:
    """Solve the ridge regression by QR, the ridge written as further rows."""
    scale = sum(float(row @ row) for row in hidden) / hidden.shape[1]
    extra = (ridge * scale) ** 0.5 * torch.eye(hidden.shape[1], dtype=torch.float64)
    left, right = torch.cat([hidden, extra]), torch.cat([target, extra @ start.T])
    return torch.linalg.lstsq(left, right).solution.T


@pytest.mark.parametrize("ridge", [1e-6, 1e-2, 1.0, 100.0])
def test_a_refit_equals_least_squares_over_stacked_rows(ridge: float) -> None:
    rows, _ = _rows()
    start = torch.zeros(D, F, dtype=torch.float64)
    found = refit(_source(rows), start, [ridge], memory_limit=LIMIT)
    hidden, target, held_out = rows
    assert relative_error(found.weight, _stacked(hidden, target, start, ridge)) < 1e-10
    unseen = _stacked(hidden[~held_out], target[~held_out], start, ridge)
    partial = refit(_source(rows), start, [ridge], memory_limit=LIMIT, final=False)
    assert relative_error(partial.weight, unseen) < 1e-10
    missed = sum(
        float((unseen @ h - y).square().sum()) for h, y in zip(hidden[held_out], target[held_out], strict=True)
    )
    assert found.after == pytest.approx(missed, rel=1e-9)
    assert (found.tokens, found.ridge) == (160, ridge)
    assert found.before == pytest.approx(found.energy), "an output matrix of zeros misses all of the target"


def test_the_ridge_is_the_one_that_held_out_tokens_prefer() -> None:
    rows, weight = _rows(noise=3.0, tokens=60)
    hidden, target, held_out = rows
    start = weight + 0.8 * torch.randn(D, F, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ridges = [1e-6, 1e-3, 1e-1, 1.0, 10.0, 1e3]
    misses = {}
    for ridge in ridges:
        fitted = _stacked(hidden[~held_out], target[~held_out], start, ridge)
        misses[ridge] = float((hidden[held_out] @ fitted.T - target[held_out]).square().sum())
    best = min(misses, key=lambda ridge: misses[ridge])
    assert best not in (ridges[0], ridges[-1]), "or the choice would be none"
    found = refit(_source(rows), start, ridges, memory_limit=LIMIT)
    assert found.ridge == best
    assert found.after == pytest.approx(misses[best])
    assert found.before == pytest.approx(float((hidden[held_out] @ start.T - target[held_out]).square().sum()))


def _two_kinds(tokens: int = 150, seed: int = 0) -> tuple[Rows, torch.Tensor, torch.Tensor]:
    """Make rows of three data sets whose maps differ; returns them, the data set of each, and a start between them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    domain, hidden, shared = torch.arange(tokens) % 3, normal(tokens, F), normal(D, F)
    maps = torch.stack([shared + 0.4 * normal(D, F) for _ in range(3)])
    target = torch.einsum("tdf,tf->td", maps[domain], hidden) + 0.3 * normal(tokens, D)
    held_out = torch.arange(tokens) // 3 % 5 == 4
    return (hidden, target, held_out), domain, shared + 0.6 * normal(D, F)


@pytest.mark.parametrize("memory_limit", [LIMIT, 1])
def test_with_several_data_sets_the_ridge_is_the_one_for_text_in_and_out_of_them(memory_limit: int) -> None:
    """Every trial is solved anew by QR: one for the held-out rows, and one for each data set that is left out."""
    rows, domain, start = _two_kinds()
    hidden, target, held_out = rows
    ridges = [1e-4, 1e-2, 0.1, 0.3, 1.0, 10.0, 100.0]

    def missed(weight: torch.Tensor, judge: torch.Tensor) -> float:
        return float((hidden[judge] @ weight.T - target[judge]).square().sum())

    def errors(ridge: float) -> tuple[float, float]:
        inside, *others = (
            missed(_stacked(hidden[used], target[used], start, ridge), judge)
            for used, judge in (
                (~held_out, held_out),
                *((~held_out & (domain != kind), ~held_out & (domain == kind)) for kind in range(3)),
            )
        )
        return inside, sum(others)

    before = missed(start, held_out), missed(start, ~held_out)
    judged = {ridge: errors(ridge) for ridge in ridges}
    shares = {ridge: sum(a / b for a, b in zip(found, before, strict=True)) for ridge, found in judged.items()}
    best = min(shares, key=lambda ridge: shares[ridge])
    alone = min(ridges, key=lambda ridge: judged[ridge][0])
    assert best > alone, "or the other text would not have counted"
    found = refit(_source(rows, domain=domain), start, ridges, memory_limit=memory_limit)
    assert (found.ridge, found.after) == (best, pytest.approx(judged[best][0], rel=1e-5))
    assert relative_error(found.weight, _stacked(hidden, target, start, best)) < 1e-5
    assert refit(_source(rows), start, ridges, memory_limit=memory_limit).ridge == alone


def test_a_fit_that_does_worse_than_the_start_on_data_that_are_left_out_is_none() -> None:
    assert best_ridge([[4.0, 2.0, 1.0], [1.0, 0.5, 1.2], [1.0, 1.4, 1.5]]) == 0, "of both data sets together"
    assert best_ridge([[4.0, 1.0], [1.0, 1.2], [1.0, 0.9]]) is None
    assert best_ridge([[4.0, 5.0], [1.0, 0.1]]) is None
    assert best_ridge([[4.0, 3.0, 1.0]]) == 1, "one data set leaves the held-out tokens alone to choose"
    assert best_ridge([[4.0, 3.0, 1.0], [1.0, 0.9]]) == 0, "what was not tried on all is not chosen"
    # A data set that alone reaches an expert leaves no other to be fitted to.
    assert best_ridge([[4.0, 3.0], [1.0, 1.0]]) == 0


def _stays(found: ExpertFit, start: torch.Tensor) -> bool:
    return found.ridge is None and torch.equal(found.weight, start) and found.after == found.before


@pytest.mark.parametrize("memory_limit", [LIMIT, 1])
def test_an_expert_keeps_its_weights_where_no_fit_is_better(memory_limit: int) -> None:
    (hidden, _, held_out), weight = _rows(tokens=30)
    noise = torch.randn(30, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    right = refit(
        _source((hidden, hidden @ weight.T + noise, held_out)), weight, [1e-3, 0.1], memory_limit=memory_limit
    )
    assert _stays(right, weight), "it was right, and the tokens are too few to tell"
    none = torch.zeros(30, dtype=torch.bool)
    for judge in (none, ~none):
        unjudged = refit(_source((hidden, noise, judge)), weight, [0.1], memory_limit=memory_limit)
        assert _stays(unjudged, weight)
    assert _stays(refit(lambda: [], weight, [0.1], memory_limit=memory_limit), weight)
    dead = refit(_source((0 * hidden, noise, held_out)), weight, [0.1], memory_limit=memory_limit)
    assert _stays(dead, weight)


@pytest.mark.parametrize("memory_limit", [1, 8 * 8 * F * 2, 8 * 8 * F * D])
@pytest.mark.parametrize("final", [True, False])
def test_without_a_matrix_of_the_width_squared_the_answer_is_the_same(memory_limit: int, final: bool) -> None:
    rows, _ = _rows(noise=2.0, scale=3.0)
    start = torch.randn(D, F, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ridges = [1e-4, 1e-2, 1.0, 100.0]
    direct = refit(_source(rows), start, ridges, memory_limit=LIMIT, final=final)
    wide = refit(_source(rows), start, ridges, memory_limit=memory_limit, final=final)
    assert wide.ridge == direct.ridge is not None
    assert relative_error(wide.weight, direct.weight) < 1e-5
    for name in ("tokens", "before", "after", "energy"):
        assert getattr(wide, name) == pytest.approx(getattr(direct, name), rel=1e-5)


@pytest.mark.parametrize("final", [True, False])
def test_few_tokens_of_a_wide_expert_are_solved_exactly(final: bool) -> None:
    width, outputs, tokens = 60, 50, 30
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator).double() for shape in ((tokens, width), (width, outputs))]
    hidden, target, held_out = made[0], made[0] @ made[1], torch.arange(tokens) % 5 == 4
    start = torch.zeros(outputs, width, dtype=torch.float64)
    # No room for a matrix [60, 60] and its like; 20 rows of the output matrix at a time.
    limit = 150_000
    found = refit(_source((hidden, target, held_out), 7), start, [1e-3, 1.0], memory_limit=limit, final=final)
    used = slice(None) if final else ~held_out
    assert found.ridge is not None
    assert (found.tokens, found.energy) == (24, pytest.approx(float(target[held_out].square().sum())))
    expected = _stacked(hidden[used], target[used], start, found.ridge)
    assert relative_error(found.weight, expected) < 1e-10, "conjugate gradients stop at 1e-6"
    unseen = _stacked(hidden[~held_out], target[~held_out], start, found.ridge)
    missed = (hidden[held_out] @ unseen.T - target[held_out]).square().sum()
    assert found.after == pytest.approx(float(missed), rel=1e-9)


def test_sums_over_parts_are_those_over_all() -> None:
    (hidden, target, _), weight = _rows()
    whole, parts = NormalEquations.empty(weight), NormalEquations.empty(weight)
    whole.add(hidden, target)
    for number in range(0, TOKENS, 50):
        part = NormalEquations.empty(weight)
        part.add(hidden[number : number + 50], target[number : number + 50])
        parts = parts + part
    assert (parts.count, whole.count) == (TOKENS, TOKENS)
    assert relative_error(parts.gram, whole.gram) < 1e-14
    assert relative_error(parts.cross, whole.cross) < 1e-14
    assert whole.error(weight) == pytest.approx(float((hidden @ weight.T - target).square().sum()))


@pytest.mark.parametrize("has_bias", [True, False])
def test_a_mean_shift_moves_the_mean_and_as_little_as_it_takes(has_bias: bool) -> None:
    (hidden, target, held_out), weight = _rows()
    hidden = torch.cat([hidden[:, :-1] + 0.5, torch.rand(TOKENS, 1, dtype=torch.float64)], 1)
    target = hidden @ weight.T + 3
    start = weight + 0.01
    found = mean_shift(_source((hidden, target, held_out)), start, has_bias=has_bias)
    assert found.ridge == 0
    assert found.after < found.before
    torch.testing.assert_close((hidden @ found.weight.T).mean(0), target.mean(0))
    missing = (target - hidden @ start.T).mean(0)[:, None]
    used = hidden[:, -1:] if has_bias else hidden
    smallest = missing @ torch.linalg.pinv(used.mean(0)[:, None])
    torch.testing.assert_close((found.weight - start)[:, -smallest.shape[1] :], smallest)
    assert not has_bias or torch.equal(found.weight[:, :-1], start[:, :-1])
