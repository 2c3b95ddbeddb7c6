"""Compensated rounding, against the same elimination written one column and one inverse at a time."""

import re

import pytest
import torch

from hf_mcsmoe.methods.choice import BITS, Grid
from hf_mcsmoe.quantization.codes import Codes, code_range
from hf_mcsmoe.quantization.compensation import DAMPING, compensated, compensated_experts
from hf_mcsmoe.quantization.nearest import nearest

GRIDS = [Grid(bits, 16, symmetric) for bits in BITS for symmetric in (True, False)]


def drawn(seed: int, out: int = 12, width: int = 32, tokens: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a matrix [out, width] and the second moment of inputs that go together."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, width, generator=generator) @ torch.randn(width, width, generator=generator)
    inputs = inputs * torch.rand(width, generator=generator)
    return torch.randn(out, width, generator=generator), inputs.T @ inputs


def error(weight: torch.Tensor, moment: torch.Tensor, codes: Codes) -> torch.Tensor:
    """Return the squared error of each output on inputs of such a moment."""
    missed = weight.double() - codes.dequantized(torch.float64)
    return torch.einsum("oi,ij,oj->o", missed, moment.double(), missed)


def eliminated(weight: torch.Tensor, moment: torch.Tensor, codes: Codes) -> torch.Tensor:
    """Return the values that elimination gives, column by column, with the scales that were found."""
    work, values = weight.double().clone(), torch.zeros_like(weight)
    damped = moment.double() / moment.double().diagonal().mean()
    inverse = (damped + DAMPING * torch.eye(len(damped), dtype=torch.float64)).inverse()
    size = codes.grid.group_size
    loads = moment.diagonal().view(-1, size)
    order = [
        group * size + int(column)
        for group in loads.sum(1).argsort(descending=True).tolist()
        for column in loads[group].argsort(descending=True)
    ]
    for column in order:
        scale = codes.scale[:, column // size].double()
        zero = 0 if codes.zero is None else codes.zero[:, column // size]
        values[:, column] = (work[:, column] / scale + zero).round().clamp(*code_range(codes.grid.bits))
        missed = (work[:, column] - (values[:, column] - zero) * scale) / inverse[column, column]
        work -= missed[:, None] * inverse[column]
        inverse = inverse - inverse[:, column, None] * inverse[column] / inverse[column, column]
    return values


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_columns_make_up_for_those_before_them(grid: Grid) -> None:
    weight, moment = drawn(0)
    codes, plain = compensated(weight, moment, grid), nearest(weight, grid, moment)
    ours, theirs = error(weight, moment, codes), error(weight, moment, plain)
    assert (ours <= theirs).all()
    assert ours.sum() < 0.75 * theirs.sum()
    expected, chosen = eliminated(weight, moment, codes), ours < theirs
    assert chosen.sum() > 6
    # A value within a rounding error of the middle between two codes may fall to either side.
    assert (codes.values[chosen] != expected[chosen]).double().mean() < 0.02


@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize("grid", GRIDS[2:], ids=str)
def test_few_tokens_are_never_worse_than_rounding(grid: Grid, tokens: int) -> None:
    weight, moment = drawn(1, tokens=tokens)
    codes, plain = compensated(weight, moment, grid), nearest(weight, grid, moment)
    assert (error(weight, moment, codes) <= error(weight, moment, plain)).all()
    assert codes.dequantized(torch.float32).isfinite().all()
    if not tokens:
        assert torch.equal(codes.values, plain.values)


def test_inputs_that_go_alone_are_rounded_to_the_nearest() -> None:
    weight, grid = drawn(2)[0], Grid(4, 16)
    codes = compensated(weight, torch.eye(32), grid)
    assert torch.equal(codes.dequantized(torch.float32), nearest(weight, grid).dequantized(torch.float32))


def test_experts_side_by_side_are_as_each_by_itself() -> None:
    drawn_ones = [drawn(seed) for seed in range(3)]
    weights, moments = (torch.stack(list(parts)) for parts in zip(*drawn_ones, strict=True))
    grid = Grid(3, 16)
    for codes, (weight, moment) in zip(compensated_experts(weights, moments, grid), drawn_ones, strict=True):
        alone = compensated(weight, moment, grid)
        assert (codes.values != alone.values).double().mean() < 0.01
        torch.testing.assert_close(codes.scale, alone.scale, rtol=0.02, atol=1e-4)


def test_blocks_of_a_moment_are_matrices_by_themselves() -> None:
    weight, moment = drawn(4)
    grid, blocks = Grid(3, 16, symmetric=True), torch.stack([moment[:16, :16], moment[16:, 16:]])
    codes = compensated(weight, blocks, grid)
    for part in (slice(0, 16), slice(16, 32)):
        alone = compensated(weight[:, part], moment[part, part], grid)
        assert (codes.values[:, part] != alone.values).double().mean() < 0.01
    with pytest.raises(ValueError, match=re.escape("Blocks of 8 do not hold whole groups of 16")):
        compensated(weight, torch.ones(4, 8, 8), grid)


def test_a_moment_that_is_not_finite_is_refused() -> None:
    weight, moment = drawn(5)
    with pytest.raises(ValueError, match="second moment of the inputs"):
        compensated(weight, moment.fill_(float("nan")), Grid(4, 16))
