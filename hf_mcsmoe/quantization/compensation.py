"""Rounding column by column, what each misses being made up for by those that follow (GPTQ, arXiv 2210.17323)."""

import torch

from hf_mcsmoe.methods.choice import Grid
from hf_mcsmoe.quantization.codes import Codes, scale_dtype
from hf_mcsmoe.quantization.nearest import (
    ROUNDING,
    as_codes,
    check_quantizable,
    find_scales,
    input_importance,
    levels,
    nearest_codes,
    nearest_experts,
)

# The name that the method has.
COMPENSATED = "gptq"
# Added to the diagonal of a second moment, in shares of its mean.
DAMPING = 0.01


def compensated(weight: torch.Tensor, moment: torch.Tensor, grid: Grid, dtype: torch.dtype | None = None) -> Codes:
    """Return codes of a matrix [out, in] whose outputs err least on inputs of a second moment.

    Each column is rounded in turn, and the columns after it take up what it missed of the outputs. Groups come by
    falling moment of their inputs, and so do the columns in each; a group's scale is found on the values that it has
    by then. A row for which the nearest codes err less has those.

    Args:
        moment: [in, in], or what lies in blocks of equal size along its diagonal, [blocks, B, B], where the whole
            would take too much memory; columns then make up for others of their block. B is a multiple of the group.
        dtype: of the scales; None for `scale_dtype` of the weight.

    Raises:
        ValueError: see `nearest`.
    """
    return compensated_experts(weight[None], moment[None], grid, dtype)[0]


@ROUNDING.register(COMPENSATED, paper="2210.17323")
def compensated_experts(
    weights: torch.Tensor, moments: torch.Tensor | None, grid: Grid, dtype: torch.dtype | None = None
) -> list[Codes]:
    """Return the codes of several matrices [G, out, in] side by side, each as `compensated` makes them.

    Args:
        moments: [G, in, in] or [G, blocks, B, B]; without any, the nearest codes.
    """
    if moments is None or not weights.numel():
        return nearest_experts(weights, None, grid, dtype)
    dtype = dtype or scale_dtype(weights.dtype)
    check_quantizable(weights, grid, moments, dtype)
    width, size = weights.shape[-1], moments.shape[-1]
    if size % grid.group_size or width % size:
        raise ValueError(
            f"Blocks of {size} do not hold whole groups of {grid.group_size}, or not all of {width} inputs."
        )
    # A block with its columns is a matrix by itself.
    moments = moments.reshape(-1, size, size)
    parts = weights.float().unflatten(-1, (-1, size)).transpose(1, 2).flatten(0, 1)  # [G * blocks, out, B]
    chosen = _better(parts, moments, _nearest(parts, moments, grid, dtype), _compensated(parts, moments, grid, dtype))
    values, scale, *zero = [
        part.unflatten(0, (len(weights), -1)).transpose(1, 2).flatten(-2) for part in chosen if part is not None
    ]
    return [
        as_codes(values[expert], scale[expert], zero[0][expert] if zero else None, grid, dtype)
        for expert in range(len(weights))
    ]


# Codes [N, out, in], scales and zero points [N, out, in/group], as floats.
_Found = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def _nearest(weights: torch.Tensor, moments: torch.Tensor, grid: Grid, dtype: torch.dtype) -> _Found:
    groups = weights.unflatten(-1, (-1, grid.group_size))
    importance = torch.stack([input_importance(one, part) for one, part in zip(moments, groups, strict=True)])
    scale, zero = find_scales(groups, importance[:, None], grid, dtype)
    return nearest_codes(groups, scale, zero, grid.bits).flatten(-2), scale, zero


def _compensated(weights: torch.Tensor, moments: torch.Tensor, grid: Grid, dtype: torch.dtype) -> _Found:
    """Return the compensated codes of matrices [N, out, in], in the order of their columns."""
    order, groups = _order(moments, grid.group_size)
    work = weights.gather(2, order[:, None].expand_as(weights))
    factor = _factor(moments, order)
    codes, found = [], []
    for start in range(0, weights.shape[-1], grid.group_size):
        stop = start + grid.group_size
        own = factor[:, start:stop, start:stop]
        code, missed, scales = _group(work[..., start:stop].clone(), own, grid, dtype)
        work[..., stop:].baddbmm_(missed, factor[:, start:stop, stop:], alpha=-1)
        codes.append(code)
        found.append(scales)
    values = torch.cat(codes, -1)
    values = torch.empty_like(values).scatter_(2, order[:, None].expand_as(values), values)
    place = groups.argsort(1)[:, None]
    scale, *zero = [torch.stack(list(parts), -1) for parts in zip(*found, strict=True) if parts[0] is not None]
    scale, *zero = [part.gather(2, place.expand_as(part)) for part in (scale, *zero)]
    return values, scale, zero[0] if zero else None


def _group(
    block: torch.Tensor, factor: torch.Tensor, grid: Grid, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor | None]]:
    """Round one group of columns [N, out, group]; return codes, what columns missed, and scales with zero points.

    Args:
        factor: [N, group, group], upper triangular.
    """
    pivots = factor.diagonal(dim1=1, dim2=2)  # [N, group]
    importance = pivots.pow(-2)  # what a column misses costs so much after the others have made up for it
    scale, zero = find_scales(block, (importance / importance.mean(1, keepdim=True))[:, None], grid, dtype)
    codes, missed = torch.empty_like(block), torch.empty_like(block)
    for column in range(block.shape[-1]):
        code = nearest_codes(block[..., column, None], scale, zero, grid.bits)
        error = block[..., column] - levels(code, zero)[..., 0] * scale
        codes[..., column] = code[..., 0]
        missed[..., column] = error / pivots[:, column, None]
        block[..., column + 1 :].addcmul_(missed[..., column, None], factor[:, column, None, column + 1 :], value=-1)
    return codes, missed, (scale, zero)


def _order(moments: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return in which order columns, int [N, in], and groups, int [N, in/group], are rounded: by falling moment."""
    diagonal = moments.diagonal(dim1=1, dim2=2).unflatten(1, (-1, group_size))
    groups = diagonal.sum(-1).argsort(dim=1, descending=True, stable=True)
    columns = diagonal.argsort(dim=-1, descending=True, stable=True)
    columns = columns + group_size * torch.arange(columns.shape[1], device=columns.device)[:, None]
    return columns.gather(1, groups[..., None].expand_as(columns)).flatten(1), groups


def _factor(moments: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Return the upper triangular factor of the damped inverse of moments [N, in, in], their inputs in an order."""
    moments = moments.double()
    moments = moments.gather(1, order[..., None].expand_as(moments)).gather(2, order[:, None].expand_as(moments))
    diagonal = moments.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1, keepdim=True)
    # The scale of a moment says nothing; of one that is zero, the inverse is the identity.
    moments = moments / torch.where(mean > 0, mean, 1)[..., None]
    moments.diagonal(dim1=1, dim2=2).add_(torch.where(mean > 0, DAMPING, 1))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments))
    return torch.linalg.cholesky(inverse, upper=True).float()


def _better(weights: torch.Tensor, moments: torch.Tensor, first: _Found, second: _Found) -> _Found:
    """Return for each row what errs less on inputs of such moments, `(w - q) M (w - q)^T`."""
    better = _errors(weights, moments, second) < _errors(weights, moments, first)  # [N, out]
    values, scale, *zero = [
        torch.where(better[..., None], theirs, own)
        for theirs, own in zip(second, first, strict=True)
        if theirs is not None and own is not None
    ]
    return values, scale, zero[0] if zero else None


def _errors(weights: torch.Tensor, moments: torch.Tensor, found: _Found) -> torch.Tensor:
    values, scale, zero = found
    groups = values.unflatten(-1, (scale.shape[-1], -1))
    missed = (weights - (levels(groups, zero) * scale[..., None]).flatten(-2)).double()
    return ((missed @ moments.double()) * missed).sum(-1)
