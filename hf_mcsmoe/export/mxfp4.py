"""The experts of gpt-oss in MXFP4, as its own checkpoints store them: four bits a weight, and a scale for 32 of them.

A code is a sign and one of eight numbers (e2m1), a scale a power of two (e8m0): OCP Microscaling Formats, 1.0.
"""

from collections.abc import Iterable
from typing import Any

import torch

METHOD, GROUP = "mxfp4", 32
# What the three bits under the sign stand for, and where halves of the way to the next lie.
LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
HALFWAY = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
# Exponent of the largest level's power of two, and what is added to a scale's exponent.
TOP, BIAS = 2, 127
# What gpt-oss does not store in MXFP4.
NOT_CONVERTED = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]


def mxfp4_config() -> dict[str, Any]:
    """Return the `quantization_config` of a checkpoint whose experts are in MXFP4."""
    return {"quant_method": METHOD, "modules_to_not_convert": NOT_CONVERTED}


def mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a weight [..., in] in MXFP4: blocks uint8 [..., in / 32, 16], two codes a byte, and scales uint8.

    Each group has the exponent of its largest weight, or the next one where that comes nearer: the first cuts what
    lies over 6 of its units, the second rounds more coarsely. Weights that were in MXFP4 before come out as they were.

    Raises:
        ValueError: groups of 32 do not divide the input axis, or a weight is not finite.
    """
    if weight.shape[-1] % GROUP:
        raise ValueError(
            f"MXFP4 has groups of {GROUP}, which do not divide the {weight.shape[-1]} inputs of a matrix."
        )
    values = weight.float().unflatten(-1, (-1, GROUP))
    if not bool(values.isfinite().all()):
        raise ValueError("A weight is not finite, and has no form in MXFP4.")
    largest = values.abs().amax(-1)
    first = (torch.frexp(largest).exponent - 1 - TOP).clamp(-BIAS, BIAS)
    both = [(exponent, _codes(values, exponent)) for exponent in (first, (first + 1).clamp(max=BIAS))]
    errors = [(_decoded(codes, exponent) - values).square().sum(-1) for exponent, codes in both]
    coarser = errors[1] < errors[0]
    exponent = torch.where(coarser, both[1][0], both[0][0])
    codes = torch.where(coarser[..., None], both[1][1], both[0][1])
    return codes[..., ::2] | codes[..., 1::2] << 4, (exponent + BIAS).to(torch.uint8)


def _codes(values: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    """Return the nearest codes uint8 of groups [..., 32] under scales 2^exponent."""
    scaled = torch.ldexp(values, -exponent[..., None])
    level = torch.bucketize(scaled.abs().contiguous(), torch.tensor(HALFWAY, device=values.device))
    return level.to(torch.uint8) | (torch.signbit(values).to(torch.uint8) << 3)


def _decoded(codes: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    levels = torch.tensor([*LEVELS, *(-level for level in LEVELS)], device=codes.device)
    return torch.ldexp(levels[codes.long()], exponent[..., None])


def mxfp4_experts(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the experts of gpt-oss, dense matrices [G, in, out] and biases by name, as its checkpoints store them."""
    stored = {}
    for name, tensor in state.items():
        if name.endswith("_bias"):
            stored[name] = tensor
        else:  # one after the other, each of which takes several times its size
            blocks, scales = zip(*(mxfp4(matrix.mT) for matrix in tensor), strict=True)
            stored[f"{name}_blocks"], stored[f"{name}_scales"] = torch.stack(blocks), torch.stack(scales)
    return stored


def rounded_experts(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the experts of gpt-oss as what MXFP4 makes of them stands for."""
    return {
        name: tensor if name.endswith("_bias") else torch.stack([_rounded(matrix.mT).mT for matrix in tensor])
        for name, tensor in state.items()
    }


def _rounded(weight: torch.Tensor) -> torch.Tensor:
    blocks, scales = mxfp4(weight)
    codes = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2)
    return _decoded(codes, scales.int() - BIAS).flatten(-2).to(weight.dtype)


def mxfp4_bytes(parameters: Iterable[tuple[str, torch.Tensor]]) -> int:
    """Return the bytes of what `mxfp4_experts` makes of these."""
    bits = 4 + 8 / GROUP
    return sum(
        tensor.nbytes if name.endswith("_bias") else round(tensor.numel() * bits / 8) for name, tensor in parameters
    )
