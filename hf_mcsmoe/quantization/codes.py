"""A matrix in a few bits: codes, and a scale for each group of them."""

import functools
from dataclasses import dataclass

import torch

from hf_mcsmoe.methods.choice import Grid

# What a scale can be stored in.
SCALES = (torch.bfloat16, torch.float16)
# A group that is chosen, not asked for, is no smaller: below, scales take more bytes than they save.
SMALLEST_GROUP = 16


@dataclass(frozen=True)
class Codes:
    """One matrix [out, in] as codes, with a scale and perhaps a zero point for each group along `in`.

    `values` int8 [out, in] in [-2^(b-1), 2^(b-1) - 1], `scale` [out, in/group] in bfloat16 or float16, either sign,
    `zero` int8 [out, in/group] in the range of the values, or None around zero.
    """

    values: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    grid: Grid

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the matrix [out, in] that the codes stand for, `(values - zero) * scale` in float32, then cast."""
        levels = self.values.float().unflatten(-1, (-1, self.grid.group_size))
        if self.zero is not None:
            levels = levels - self.zero.float()[..., None]
        return (levels * self.scale.float()[..., None]).flatten(-2).to(dtype)


def code_range(bits: int) -> tuple[int, int]:
    """Return the smallest and the largest code of so many bits."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what scales of weights of a dtype are stored in: float16 beside float16, else bfloat16."""
    return torch.float16 if dtype == torch.float16 else torch.bfloat16


def check_group_size(width: int, group_size: int, what: str = "a matrix") -> None:
    """Check that groups divide the `width` of an input axis.

    Raises:
        ValueError: they do not; the message shows the sizes that do.
    """
    if width % group_size:
        choices = [size for size in _divisors(width) if SMALLEST_GROUP <= size <= 128] or [width]
        raise ValueError(
            f"group_size={group_size} does not divide the {width} inputs of {what}: choose "
            f"{' or '.join(map(str, choices))}."
        )


def group_size_for(width: int, wanted: int) -> int:
    """Return the largest group up to `wanted` that divides an input axis; where it would be tiny, the next larger."""
    sizes = _divisors(width)
    return max(
        (size for size in sizes if SMALLEST_GROUP <= size <= wanted),
        default=min((size for size in sizes if size >= min(wanted, SMALLEST_GROUP)), default=width),
    )


@functools.cache
def _divisors(width: int) -> list[int]:
    return [size for size in range(1, width + 1) if width % size == 0]
