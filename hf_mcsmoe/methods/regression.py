"""Experts merged with an output matrix that is fitted to what the members put out."""

import torch

from hf_mcsmoe.methods.experts import Expert, output_of
from hf_mcsmoe.methods.merging import MERGING, average
from hf_mcsmoe.methods.view import LayerView

# Ridge of the fit, in multiples of the mean diagonal: no more than a solution takes in float32.
RIDGE = 1e-5


@MERGING.register("regression", paper="2510.14436", needs=["sample"])
def regression(
    view: LayerView, members: list[int], shares: list[float], permutations: list[torch.Tensor | None]
) -> Expert:
    """Return the average of the members with the output matrix of least squares (MergeMoE, section 4).

    `sum_x |W h(x) - sum_i s_i f_i(x)|^2` is smallest, for the hidden states h of the averaged gate and up over the
    inputs x of the sample. Where these are fewer than h is wide, W is the averaged one as far as they do not tell.
    """
    merged = average(view, members, shares, permutations)
    inputs = view.sample.per_input().hidden
    outputs = (view.experts.output(m, inputs, normed=False) * s for m, s in zip(members, shares, strict=True))
    hidden = view.experts.hidden_of(merged, inputs)
    start = merged["down"].to(hidden)
    missed = sum(outputs, -output_of(merged, hidden))
    return {**merged, "down": start + _solved(hidden, missed)}


def _solved(hidden: torch.Tensor, missed: torch.Tensor) -> torch.Tensor:
    """Return the matrix [D, F] of least squares from hidden states [n, F] to what is missed [n, D], of a small ridge.

    Solved in float64 by the smaller of the two Gram matrices, [n, n] or [F, F].
    """
    rows, targets = hidden.double(), missed.double()
    is_wide = rows.shape[0] < rows.shape[1]
    gram = rows @ rows.T if is_wide else rows.T @ rows
    ridge = RIDGE * gram.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    gram.diagonal().add_(ridge)
    solved = rows.T @ torch.linalg.solve(gram, targets) if is_wide else torch.linalg.solve(gram, rows.T @ targets)
    return solved.T.to(hidden)
