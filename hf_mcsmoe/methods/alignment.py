"""Bringing the hidden neurons of an expert into the order of another's before their weights are averaged."""

import torch
from scipy.optimize import linear_sum_assignment

from hf_mcsmoe.methods.experts import HIDDEN_AXES
from hf_mcsmoe.methods.registry import Registry

ALIGNMENT = Registry("alignment")


@ALIGNMENT.register("weight_matching", paper="2209.04836")
def weight_matching(reference: dict[str, torch.Tensor], expert: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """Return the permutation int [F] of `expert`'s neurons that fits `reference` best: one exact assignment.

    It maximises the inner product of all weights that belong to a neuron: rows of gate and up, columns of down, and
    their biases, gate and up under one permutation (M-SMoE, section 3.1; Git Re-Basin, section 3.2, one layer).
    """
    width, device = reference["up"].shape[0], reference["up"].device
    cost = torch.zeros(width, width, device=device)
    for role, axis in HIDDEN_AXES.items():
        if role in reference and axis is not None:
            rows = [side[role].float().movedim(axis, 0).reshape(width, -1) for side in (reference, expert)]
            cost.addmm_(rows[0], rows[1].T, alpha=-1)
    # A cost to minimise: for a gain to maximise SciPy would make a negated copy.
    columns = linear_sum_assignment(cost.cpu().numpy())[1]
    return torch.from_numpy(columns)


@ALIGNMENT.register("none")
def none(reference: dict[str, torch.Tensor], expert: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """Return None: the neurons stay in their order (the paper's ablation)."""
    return None
