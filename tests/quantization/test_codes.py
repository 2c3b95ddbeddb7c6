"""Codes of a matrix: their range, their scales and what they stand for, against a search written out."""

import itertools
import re

import pytest
import torch

from hf_mcsmoe.methods.choice import BITS, Grid
from hf_mcsmoe.quantization.codes import Codes, check_group_size, code_range, group_size_for
from hf_mcsmoe.quantization.nearest import nearest

GRIDS = [Grid(bits, 16, symmetric) for bits in BITS for symmetric in (True, False)]


def matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stands_for(codes: Codes) -> torch.Tensor:
    """Return the matrix of some codes, value by value."""
    values, zero = codes.values.double(), codes.zero
    result = torch.empty_like(values)
    for row, column in itertools.product(*map(range, values.shape)):
        group = column // codes.grid.group_size
        shift = 0 if zero is None else zero[row, group].item()
        result[row, column] = (values[row, column] - shift) * codes.scale[row, group].double()
    return result


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_codes_stand_for_values_near_the_weight(grid: Grid) -> None:
    weight = matrix(6, 32)
    codes = nearest(weight, grid)
    lowest, highest = code_range(grid.bits)
    assert codes.values.dtype == torch.int8
    assert codes.scale.dtype == torch.bfloat16
    assert codes.values.min() >= lowest
    assert codes.values.max() <= highest
    assert (codes.zero is None) == grid.symmetric
    assert codes.scale.shape == (6, 2)
    torch.testing.assert_close(codes.dequantized(torch.float64), stands_for(codes), rtol=1e-6, atol=1e-6)
    # A range of twice the peak in equal steps misses half a step at most; the search does better than all of it.
    step = 2 * weight.view(6, 2, 16).abs().amax(-1, keepdim=True) / (2**grid.bits - 2)
    worst = (step.square() / 4).expand(6, 2, 16).sum()
    assert (codes.dequantized(torch.float32) - weight).square().sum() < worst / 2


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_no_scale_of_a_fine_search_is_much_better(grid: Grid, weighted: bool) -> None:
    weight, moment = matrix(4, 16, seed=3), None
    counts = torch.ones(16)
    if weighted:
        counts = torch.logspace(-1, 1, 16)
        moment = torch.diag(counts)
    lowest, highest = code_range(grid.bits)
    codes = nearest(weight, grid, moment)
    reached = ((codes.dequantized(torch.float32) - weight).square() * counts).sum(1)
    zeros = torch.tensor([0.0]) if grid.symmetric else torch.arange(lowest, highest + 1.0)
    peak = weight.abs().amax(1) / highest
    scales = torch.cat([torch.linspace(0.2, 1.5, 80), -torch.linspace(0.2, 1.5, 80)])
    tried = scales[None, :, None, None] * peak[:, None, None, None]  # [row, scale, zero, 1]
    shift = zeros[None, None, :, None]
    rounded = (weight[:, None, None] / tried + shift).round().clamp(lowest, highest)
    errors = (((rounded - shift) * tried - weight[:, None, None]).square() * counts).sum(-1).flatten(1).amin(1)
    # At 2 bits a group with zero points has four zeros, of which the search tries what its range says.
    assert reached.sum() < errors.sum() * (1.35 if grid.bits < 8 else 2)


def test_the_moment_moves_the_error_to_inputs_that_hardly_occur() -> None:
    weight, grid = matrix(64, 32), Grid(3, 32)
    counts = torch.where(torch.arange(32) < 4, 100.0, 0.1)
    plain, chosen = nearest(weight, grid), nearest(weight, grid, torch.diag(counts))

    def error(codes: Codes) -> float:
        return ((codes.dequantized(torch.float32) - weight).square() * counts).sum().item()

    assert error(chosen) < 0.8 * error(plain)
    same = nearest(weight, grid, counts)
    assert torch.equal(chosen.values, same.values)
    assert torch.equal(chosen.scale, same.scale)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(
    ("value", "tolerance"),
    [(0.0, 0), (0.25, 0.005), (-3.0, 0.005), (3e38, 0.005), (-1e-30, 0.005)],
)
def test_groups_of_one_value_stay_what_they_are(grid: Grid, value: float, tolerance: float) -> None:
    restored = nearest(torch.full((2, 32), value), grid).dequantized(torch.float64)
    torch.testing.assert_close(restored, torch.full((2, 32), value, dtype=torch.float64), rtol=tolerance, atol=0)


@pytest.mark.parametrize("grid", [Grid(4, 1), Grid(2, 1, True), Grid(3, 8)], ids=str)
def test_one_value_in_a_group_of_zeros(grid: Grid) -> None:
    weight = torch.zeros(1, 8)
    weight[0, 5] = -0.75
    torch.testing.assert_close(nearest(weight, grid).dequantized(torch.float32), weight, rtol=0.005, atol=0)


def test_scales_of_float16_weights_are_float16() -> None:
    codes = nearest(matrix(2, 32).half(), Grid(4, 32))
    assert codes.scale.dtype == torch.float16
    tiny = nearest(torch.full((1, 32), 6e-8).half(), Grid(2, 32)).dequantized(torch.float32)
    assert tiny.isfinite().all()
    assert tiny.abs().max() < 2e-7


@pytest.mark.parametrize(
    ("weight", "options", "message"),
    [
        (torch.tensor([[float("nan")] * 16]), {}, "weight [1, 16] holds a value that is not finite"),
        (torch.tensor([[float("inf")] * 16]), {}, "weight [1, 16] holds a value that is not finite"),
        (torch.ones(1, 16), {"moment": torch.full((16, 16), torch.nan)}, "second moment of the inputs [16, 16]"),
        (torch.full((1, 16), 1e7), {"dtype": torch.float16}, "need scales beyond torch.float16"),
        (torch.ones(1, 16), {"dtype": torch.float32}, "cannot be stored in torch.float32"),
        (torch.ones(1, 24), {}, "group_size=16 does not divide the 24 inputs of a matrix: choose 24"),
    ],
)
def test_what_has_no_codes_is_refused(weight: torch.Tensor, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        nearest(weight, Grid(4, 16), **options)


@pytest.mark.parametrize(
    ("width", "wanted", "chosen"), [(128, 64, 64), (96, 64, 48), (96, 32, 32), (40, 64, 40), (67, 64, 67), (8, 64, 8)]
)
def test_a_group_is_the_largest_divisor(width: int, wanted: int, chosen: int) -> None:
    assert group_size_for(width, wanted) == chosen
    check_group_size(width, chosen)


def test_the_sizes_that_divide_are_shown() -> None:
    with pytest.raises(ValueError, match="group_size=48 does not divide the 64 inputs of W_in: choose 16 or 32 or 64"):
        check_group_size(64, 48, "W_in")
