"""The assignment of the least cost: by SciPy, or for wide experts by lapx where that is installed."""

from importlib.util import find_spec

import torch
from scipy.optimize import linear_sum_assignment

# The least width that lapx assigns: to the same optimum, two to four times sooner where experts are alike.
WIDE = 2048
HAS_LAPX = find_spec("lap") is not None


def assigned(cost: torch.Tensor) -> torch.Tensor:
    """Return for each row of a cost [F, F] its column in the assignment of the smallest sum, int64 [F].

    Raises:
        ValueError: the cost holds NaN or is infinite.
    """
    if not (cost.sum().isfinite() or cost.isfinite().all()):  # a sum may overflow
        raise ValueError("The weights or hidden states of two experts that are to be aligned are not finite.")
    values = cost.cpu().numpy()
    if HAS_LAPX and len(values) >= WIDE:
        import lap

        return torch.from_numpy(lap.lapjv(values, return_cost=False)[0]).long()
    return torch.from_numpy(linear_sum_assignment(values)[1])


def assignment_bytes(width: int) -> int:
    """Return the bytes that an assignment of experts of this width takes: its costs, in float32 and in float64."""
    return 12 * width**2
