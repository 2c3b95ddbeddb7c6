"""Splitting matrices: the best product of a rank, on the inputs or by itself, the rows kept, and the ranks chosen."""

import pytest
import torch
from helpers import relative_error

from hf_mcsmoe.low_rank.ranks import choose_ranks
from hf_mcsmoe.low_rank.split import project, refit_output, row_errors, split, split_columns, svd, weighted_svd

OUT, IN, TOKENS = 20, 12, 400


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def states() -> torch.Tensor:
    """Inputs [TOKENS, IN] that vary much more in some directions than in others."""
    return _random(TOKENS, IN, seed=1) * torch.logspace(1, -2, IN) @ _random(IN, IN, seed=2)


def _moment(states: torch.Tensor) -> torch.Tensor:
    return states.double().T @ states.double() / len(states)


def test_svd_is_the_nearest_product_of_its_rank() -> None:
    weight = _random(OUT, IN)
    u, v = svd(weight, 5)
    values = torch.linalg.eigvalsh(weight.double().T @ weight.double()).flip(0)
    assert (u.shape, v.shape) == ((OUT, 5), (5, IN))
    assert float((weight - u @ v).double().square().sum()) == pytest.approx(float(values[5:].sum()), rel=1e-4)
    torch.testing.assert_close(u.T @ u, v @ v.T, atol=1e-4, rtol=1e-4)  # sqrt(Sigma) on both sides


def test_the_weighted_factors_err_least_on_the_inputs(states: torch.Tensor) -> None:
    weight = _random(OUT, IN)
    u, v = weighted_svd(weight, 4, _moment(states))
    # The best product of rank 4 on data: the outputs projected on their own leading directions.
    outputs = states.double() @ weight.double().T
    leading = torch.linalg.svd(outputs, full_matrices=False)[2][:4]
    best = float((outputs - outputs @ leading.T @ leading).norm())
    found = float((outputs - states.double() @ (u @ v).double().T).norm())
    assert best <= found < 1.05 * best
    plain_u, plain_v = svd(weight, 4)
    assert found < 0.8 * float((outputs - states.double() @ (plain_u @ plain_v).double().T).norm())


def test_the_weighted_factors_err_where_it_counts_least(states: torch.Tensor) -> None:
    weight, counts = _random(OUT, IN), torch.logspace(2, -2, OUT).double()
    u, v = weighted_svd(weight, 4, _moment(states), counts)
    outputs = states.double() @ weight.double().T

    def error(product: torch.Tensor) -> float:
        return float(((outputs - states.double() @ product.double().T) * counts.sqrt()).norm())

    best = float(torch.linalg.svdvals(outputs * counts.sqrt())[4:].norm())
    assert best <= error(u @ v) * (1 + 1e-6) < 1.05 * best
    even = weighted_svd(weight, 4, _moment(states))
    assert error(u @ v) < 0.8 * error(even[0] @ even[1])


def test_without_tokens_the_weighted_factors_are_the_plain_ones() -> None:
    weight = _random(OUT, IN)
    for moment in (None, torch.zeros(IN, IN)):
        u, v = weighted_svd(weight, 4, moment)
        plain_u, plain_v = svd(weight, 4)
        torch.testing.assert_close(u @ v, plain_u @ plain_v, atol=1e-5, rtol=1e-4)


def test_a_row_costs_what_its_loss_does_to_the_outputs(states: torch.Tensor) -> None:
    residual = _random(OUT, IN)
    expected = [float((states.double() @ row.double()).square().mean()) for row in residual]
    torch.testing.assert_close(
        row_errors(residual, _moment(states)), torch.tensor(expected).double(), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(row_errors(residual, None), residual.double().square().sum(1))


def test_the_rows_that_fit_no_common_subspace_are_kept_and_the_others_fitted_without_them() -> None:
    common = _random(OUT, 2) @ _random(2, IN, seed=1)
    odd = [3, 7, 11]
    weight = common.clone()
    weight[odd] = 5 * _random(3, IN, seed=2)
    u, v, kept = split(weight, 2, 3, factorise="svd")
    assert kept.nonzero().flatten().tolist() == odd
    assert relative_error((u @ v)[~kept], common[~kept]) < 1e-5
    plain_u, plain_v = svd(weight, 2)
    assert relative_error((plain_u @ plain_v)[~kept], common[~kept]) > 0.1


def test_rows_that_count_nothing_are_not_kept(states: torch.Tensor) -> None:
    weight, counts = _random(OUT, IN), torch.ones(OUT)
    counts[::2] = 0
    _, _, kept = split(weight, 2, OUT // 4, _moment(states), counts)
    assert kept.sum() == OUT // 4
    assert not kept[::2].any()


def test_columns_that_fit_no_common_subspace_are_kept_and_the_others_fitted_without_them() -> None:
    common = _random(OUT, 2) @ _random(2, 40, seed=1)
    odd = [1, 5, 6]
    weight = common.clone()
    weight[:, odd] = 2 * _random(OUT, 3, seed=2)
    for moment in (None, torch.zeros(40, 40)):
        u, v, s, kept = split_columns(weight, 2, 3, moment)
        assert kept.nonzero().flatten().tolist() == odd
        assert not s[:, ~kept].any()
        assert relative_error(u @ v + s, weight) < 1e-5


def test_factors_and_kept_columns_err_least_on_the_inputs(states: torch.Tensor) -> None:
    weight = _random(OUT, IN)
    u, v, s, kept = split_columns(weight, 2, 3, _moment(states))
    inputs, outputs = states.double(), states.double() @ weight.double().T
    # The best with these columns: outputs less all that the kept inputs say of them, then their leading directions.
    known = inputs[:, kept]
    left = outputs - known @ torch.linalg.lstsq(known, outputs).solution
    best = float(torch.linalg.svdvals(left)[2:].norm())
    found = float((outputs - inputs @ (u @ v + s).double().T).norm())
    assert best <= found * (1 + 1e-6) < 1.05 * best
    assert kept.sum() == 3
    u, v, kept_rows = split(weight, 2, round(3 / IN * OUT), _moment(states))
    rows = torch.where(kept_rows[:, None], weight, u @ v)
    assert found < float((outputs - inputs @ rows.double().T).norm())


def test_projection_is_the_least_squares_solution(states: torch.Tensor) -> None:
    weight, v = _random(OUT, IN), _random(4, IN, seed=3)
    expected = torch.linalg.lstsq(states.double() @ v.double().T, states.double() @ weight.double().T).solution.T
    assert relative_error(project(weight, v, _moment(states)), expected) < 1e-4


def test_the_next_matrix_makes_up_for_hidden_states_that_changed(states: torch.Tensor) -> None:
    weight, mixing = _random(OUT, IN), _random(IN, IN, seed=4)
    changed = states @ mixing
    refitted = refit_output(weight, states.double().T @ changed.double() / TOKENS, _moment(changed))
    target = states @ weight.T
    assert relative_error(changed @ refitted.T, target) < 0.05 < relative_error(changed @ weight.T, target)


def test_without_tokens_the_next_matrix_stays() -> None:
    weight, zero = _random(OUT, IN), torch.zeros(IN, IN).double()
    torch.testing.assert_close(refit_output(weight, zero, zero), weight)


SPECTRA = [torch.tensor([8.0, 1, 1]), torch.tensor([4.0, 4, 2])]
SHAPES = [(30, 10), (30, 10)]


@pytest.mark.parametrize(
    ("options", "ranks"),
    [
        ({"rank": 3}, [3, 3]),
        # (0.5 - 0.1) * 300 / 40
        ({"parameter_ratio": 0.5, "keep": 0.1}, [3, 3]),
        ({"energy": 0.8}, [1, 2]),
        ({"energy": 0.81}, [2, 3]),
        # Shares .8 .1 .1 and .4 .4 .2: after one each, the next best are .4 and .2 of the second.
        ({"rank": 2, "scope": "global"}, [1, 3]),
        ({"energy": 0.8, "scope": "global"}, [1, 2]),
    ],
)
def test_ranks(options: dict, ranks: list[int]) -> None:
    assert choose_ranks(SPECTRA, SHAPES, **options) == ranks


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("keep", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("ratio", [0.35, 0.5, 0.8])
def test_a_ratio_is_met_to_one_rank(ratio: float, keep: float, scope: str) -> None:
    shapes = [(96, 64), (64, 48), (128, 32), (40, 40)]
    spectra = [torch.linspace(1 + number, 0, min(shape)) ** (2 + number) for number, shape in enumerate(shapes)]
    ranks = choose_ranks(spectra, shapes, parameter_ratio=ratio, keep=keep, scope=scope)
    held = [rank * (out + width) + keep * out * width for rank, (out, width) in zip(ranks, shapes, strict=True)]
    dense, costs = [out * width for out, width in shapes], [out + width for out, width in shapes]
    if scope == "layer":
        for one, size, cost in zip(held, dense, costs, strict=True):
            assert ratio * size - cost < one <= ratio * size + 1e-6
    assert ratio * sum(dense) - sum(costs) < sum(held) <= ratio * sum(dense) + 1e-6
    assert all(0 < one < size for one, size in zip(held, dense, strict=True))


def test_what_competes_stays_smaller_than_it_was() -> None:
    flat, steep = torch.ones(20), torch.tensor([1.0] + [1e-6] * 19)
    ranks = choose_ranks([steep, flat], [(20, 20), (20, 20)], rank=8, keep=0.1, scope="global")
    assert ranks[1] * 40 + 0.1 * 400 < 400 <= (ranks[1] + 1) * 40 + 0.1 * 400
    assert sum(ranks) == 16


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_more_energy_takes_more_ranks_and_holds_it(scope: str) -> None:
    spectra = [torch.logspace(0, -2 - number, 12) for number in range(3)]
    before = [1, 1, 1]
    for energy in (1e-9, 0.3, 0.6, 0.9, 0.99, 1.0):
        ranks = choose_ranks(spectra, [(20, 12)] * 3, energy=energy, scope=scope)
        assert all(old <= new <= 12 for old, new in zip(before, ranks, strict=True))
        held = [float(values[:rank].sum() / values.sum()) for values, rank in zip(spectra, ranks, strict=True)]
        assert (min(held) if scope == "layer" else sum(held) / 3) >= energy - 1e-6
        before = ranks


def test_a_ratio_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="leaves no parameters"):
        choose_ranks(SPECTRA, SHAPES, parameter_ratio=0.1, keep=0.1)
