"""Inner products of what belongs to two experts, in blocks, so that no second copy of a layer is held."""

from collections.abc import Callable, Iterable

import torch

# Numbers of all experts together in one block: 32 MB.
BLOCK = 2**22


def gram(vectors: torch.Tensor) -> torch.Tensor:
    """Return the inner products of the rows of a matrix [E, n], float64 [E, E]."""
    wide = vectors.double()
    return wide @ wide.T


def weights_gram(num_experts: int, shapes: Iterable[torch.Size], part: Callable[..., torch.Tensor]) -> torch.Tensor:
    """Return the inner products of the experts' tensors side by side, flattened, float64 [E, E] on the CPU.

    Args:
        shapes: of the tensors of one expert, in their order.
        part: called as `part(expert, tensor's number, rows)` with a slice of rows; returns these rows.
    """
    total = torch.zeros(num_experts, num_experts, dtype=torch.float64)
    for number, shape in enumerate(shapes):
        step = max(1, BLOCK * shape[0] // (num_experts * max(1, shape.numel())))
        for start in range(0, shape[0], step):
            rows = slice(start, start + step)
            block = [part(expert, number, rows).double().flatten() for expert in range(num_experts)]
            total += gram(torch.stack(block)).cpu()
    return total
