"""Codes as they are stored: packed into words, beside their scales and zero points."""

from collections.abc import Sequence
from typing import Any

import torch

from hf_mcsmoe.methods.choice import Grid
from hf_mcsmoe.modeling.modeling_mcsmoe import decomposable
from hf_mcsmoe.modeling.quantized_mcsmoe import num_words
from hf_mcsmoe.quantization.codes import Codes


def expert_bytes(shape: tuple[int, int], grid: Grid | None, dtype: torch.dtype) -> int:
    """Return the bytes on disk of one matrix `shape` (out, in), packed on a grid or, without, dense in a dtype."""
    out, width = shape
    if grid is None:
        return out * width * dtype.itemsize
    groups = width // grid.group_size
    words = out * num_words(width, grid.bits) + (0 if grid.symmetric else num_words(out, grid.bits) * groups)
    return words * torch.int32.itemsize + out * groups * torch.bfloat16.itemsize


@torch.no_grad()
def store_codes(experts: Any, weight: str, codes: Sequence[Codes]) -> None:
    """Store a weight of merged experts, in place, as the codes of each expert's matrix.

    The matrices are [out, in] whatever the family's layout, and those of `down_proj_s` each expert's kept rows.

    Args:
        weight: its name in the container, or that of a factor (`down_proj_u`).
        codes: of each expert; they may differ in bits, not in groups, symmetry or the dtype of scales.

    Raises:
        ValueError: the container has no such weight, or the codes do not fit it.
    """
    entry, experts = _entry(weight, codes), decomposable(experts)
    wanted = [(rows, experts.dense_shape(weight)[-1]) for rows in experts.matrix_rows(weight)]
    given = [tuple(one.values.shape) for one in codes]
    if given != wanted:
        raise ValueError(f"The codes of {weight!r} are {given}, where its matrices are {wanted}.")
    experts.install_quantized(weight, entry)
    for part, values in _stored(codes, side_by_side=isinstance(entry["bits"], list)).items():
        stored = getattr(experts, f"{weight}_{part}").data
        stored.copy_(values.reshape(stored.shape))


def _entry(weight: str, codes: Sequence[Codes]) -> dict[str, Any]:
    """Return what the configuration says of the codes of a weight."""
    kinds = {(one.grid.group_size, one.grid.symmetric, str(one.scale.dtype).removeprefix("torch.")) for one in codes}
    if len(kinds) != 1:
        raise ValueError(f"The codes of {weight!r} differ in groups, symmetry or the dtype of scales: {kinds}.")
    ((group_size, symmetric, scale_dtype),) = kinds
    bits = [one.grid.bits for one in codes]
    same = bits[0] if len(set(bits)) == 1 else bits
    return {"bits": same, "group_size": group_size, "symmetric": symmetric, "scale_dtype": scale_dtype}


def _stored(codes: Sequence[Codes], *, side_by_side: bool) -> dict[str, torch.Tensor]:
    """Return packed, scale and, if there are any, zero of all codes, one after another or their words side by side."""
    # A package that takes its time to be imported, for those who quantize alone.
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    packed = [pack_to_int32(one.values, one.grid.bits) for one in codes]
    zeros = [pack_to_int32(one.zero, one.grid.bits, packed_dim=0) for one in codes if one.zero is not None]
    parts = {"packed": torch.cat(packed, -1 if side_by_side else 0), "scale": torch.cat([one.scale for one in codes])}
    return parts | ({"zero": torch.cat(zeros)} if zeros else {})
