"""Rounding to the nearest code, in groups whose ranges are shrunk to where the squared error is least."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from hf_mcsmoe.methods.choice import Grid
from hf_mcsmoe.methods.registry import Registry
from hf_mcsmoe.quantization.codes import SCALES, Codes, check_group_size, code_range, scale_dtype

# Called with the matrices of some experts [G, out, in], second moments of their inputs or None, and a `Grid`.
ROUNDING = Registry("rounding")
# By bits: the smallest share of a group's range that is tried, and how many shares up to the whole.
SHARES = {8: (0.95, 3), 4: (0.65, 8), 3: (0.5, 8), 2: (0.35, 10)}
# Times that codes and the best scale for them follow from each other, after the search.
REFINEMENTS = 2
# Inputs that hardly occur count as much, in shares of the mean: their weights are still to be near.
LEAST_IMPORTANCE = 1e-4


def nearest(
    weight: torch.Tensor, grid: Grid, moment: torch.Tensor | None = None, dtype: torch.dtype | None = None
) -> Codes:
    """Return the nearest codes of a matrix [out, in], in groups along `in` whose ranges are chosen one by one.

    Of several shrunk ranges a group has the one whose squared error is least, with the scale as it is stored; each
    input counts by its second moment.

    Args:
        moment: second moment of the inputs, of which the diagonal counts: [in, in], or that diagonal [in].
        dtype: of the scales; None for `scale_dtype` of the weight.

    Raises:
        ValueError: values that are not finite, groups that do not divide `in`, or scales that the dtype cannot hold.
    """
    dtype = dtype or scale_dtype(weight.dtype)
    check_quantizable(weight, grid, moment, dtype)
    groups = weight.float().unflatten(-1, (-1, grid.group_size))
    scale, zero = find_scales(groups, input_importance(moment, groups), grid, dtype)
    return as_codes(nearest_codes(groups, scale, zero, grid.bits).flatten(-2), scale, zero, grid, dtype)


@ROUNDING.register("nearest")
def nearest_experts(
    weights: torch.Tensor, moments: torch.Tensor | None, grid: Grid, dtype: torch.dtype | None = None
) -> list[Codes]:
    """Return the nearest codes of several matrices [G, out, in].

    Args:
        moments: [G, in, in], or blocks of equal size along their diagonals, [G, blocks, B, B].
    """
    diagonals = [None] * len(weights) if moments is None else moments.diagonal(dim1=-2, dim2=-1).flatten(1)
    return [nearest(weight, grid, diagonal, dtype) for weight, diagonal in zip(weights, diagonals, strict=True)]


def as_codes(
    values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, grid: Grid, dtype: torch.dtype
) -> Codes:
    """Return codes of whole numbers [out, in], and of scales and zero points [out, in/group], that are floats."""
    return Codes(values.to(torch.int8), scale.to(dtype), None if zero is None else zero.to(torch.int8), grid)


def check_quantizable(weight: torch.Tensor, grid: Grid, moment: torch.Tensor | None, dtype: torch.dtype) -> None:
    """Check what `nearest` is given.

    Raises:
        ValueError: see there.
    """
    check_group_size(weight.shape[-1], grid.group_size)
    if dtype not in SCALES:
        raise ValueError(f"Scales cannot be stored in {dtype}: choose torch.bfloat16 or torch.float16.")
    for name, values in (("weight", weight), ("second moment of the inputs", moment)):
        if values is not None and not values.isfinite().all():
            raise ValueError(f"The {name} {list(values.shape)} holds a value that is not finite, and has no codes.")
    if weight.numel() and (peak := weight.abs().max().item()) * 2 / (2**grid.bits - 1) > torch.finfo(dtype).max:
        raise ValueError(f"Weights up to {peak:.3g} need scales beyond {dtype}: store them in torch.bfloat16.")


def input_importance(moment: torch.Tensor | None, groups: torch.Tensor) -> torch.Tensor:
    """Return what an error of each input counts, mean 1, as [in/group, group] of `groups` [out, in/group, group].

    Args:
        moment: [in, in], or its diagonal [in]; None for ones.
    """
    if moment is None:
        return groups.new_ones(groups.shape[-2:])
    diagonal = (moment.diagonal() if moment.ndim > 1 else moment).to(groups).clamp(min=0)
    relative = diagonal / diagonal.mean() if diagonal.any() else torch.ones_like(diagonal)
    return relative.clamp(min=LEAST_IMPORTANCE).view(groups.shape[-2:])


def nearest_codes(groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int) -> torch.Tensor:
    """Return the whole numbers [..., group] nearest to groups of such scales and zero points [...]."""
    codes = groups / scale[..., None]
    codes = codes if zero is None else codes + zero[..., None]
    return codes.round_().clamp_(*code_range(bits))


def levels(codes: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
    """Return what the scales of codes [..., group] multiply."""
    return codes if zero is None else codes - zero[..., None]


class _Found(NamedTuple):
    """Scales and zero points of groups [...], and their errors."""

    error: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None

    def or_better(self, other: "_Found") -> "_Found":
        """Return for each group what errs less."""
        better = other.error < self.error
        pairs = [
            (theirs, own) for theirs, own in zip(other, self, strict=True) if theirs is not None and own is not None
        ]
        error, scale, *zero = [torch.where(better, theirs, own) for theirs, own in pairs]
        return _Found(error, scale, zero[0] if zero else None)


@dataclass(frozen=True)
class _Unit:
    """Groups divided by their largest magnitude `peak` [...]: no square of a huge or tiny value leaves the range."""

    values: torch.Tensor
    peak: torch.Tensor
    importance: torch.Tensor
    bits: int
    dtype: torch.dtype

    def stored(self, scale: torch.Tensor) -> torch.Tensor:
        """Return a scale as the dtype holds it. One that is rounded to nothing is 1, which leaves its group at 0."""
        most = torch.finfo(self.dtype).max
        held = (scale * self.peak).clamp(-most, most).to(self.dtype).float()
        return torch.where(held == 0, 1.0, held) / self.peak

    def codes(self, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
        return nearest_codes(self.values, scale, zero, self.bits)

    def found(self, scale: torch.Tensor, zero: torch.Tensor | None) -> _Found:
        """Return a scale as it is stored, with the weighted squared error of the nearest codes."""
        scale = self.stored(scale)
        missed = levels(self.codes(scale, zero), zero) * scale[..., None] - self.values
        return _Found((missed.square_() * self.importance).sum(-1), scale, zero)

    def best_scale(self, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
        """Return the scale that errs least with the codes that another one gives."""
        steps = levels(self.codes(scale, zero), zero)
        weighted = steps * self.importance
        size = (weighted * steps).sum(-1)
        return torch.where(size == 0, scale, (weighted * self.values).sum(-1) / size)


def find_scales(
    groups: torch.Tensor, importance: torch.Tensor, grid: Grid, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return scale and zero point [...] of groups [..., group], as floats that what they are stored in holds.

    Args:
        importance: what an error of each value counts, broadcast to `groups`.
    """
    peak = groups.abs().amax(-1).clamp(min=torch.finfo(torch.float32).tiny)
    unit = _Unit(groups / peak[..., None], peak, importance, grid.bits, dtype)
    ranges = _symmetric_ranges(grid.bits) if grid.symmetric else _ranges(unit.values, grid.bits)
    best = unit.found(*next(ranges))
    for scale, zero in ranges:
        best = best.or_better(unit.found(scale, zero))
    for _ in range(REFINEMENTS):
        best = best.or_better(unit.found(unit.best_scale(best.scale, best.zero), best.zero))
    return (best.scale * peak).to(dtype).float(), best.zero


def _ranges(unit: torch.Tensor, bits: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield scales and zero points [...] that put shares of the range of each group, with 0 in it, on all codes."""
    least, most = unit.amin(-1).clamp(max=0), unit.amax(-1).clamp(min=0)
    lowest, highest = code_range(bits)
    for share in reversed(torch.linspace(SHARES[bits][0], 1, SHARES[bits][1]).tolist()):
        scale = share * (most - least) / (highest - lowest)
        zero = (lowest - share * least / scale.clamp(min=torch.finfo(torch.float32).tiny)).round()
        yield scale, zero.clamp(lowest, highest)


def _symmetric_ranges(bits: int) -> Iterator[tuple[torch.Tensor, None]]:
    """Yield scales around zero. The codes reach one step farther below: a negative scale turns that upwards."""
    lowest, highest = code_range(bits)
    for share in reversed(torch.linspace(SHARES[bits][0], -lowest / highest, SHARES[bits][1]).tolist()):
        for sign in (1, -1):
            yield torch.tensor(sign * share / -lowest), None
