"""Bringing the hidden neurons of an expert into the order of another's before their weights are averaged."""

import torch

from hf_mcsmoe.methods.assignment import assigned
from hf_mcsmoe.methods.experts import HIDDEN_AXES, Expert
from hf_mcsmoe.methods.registry import Registry
from hf_mcsmoe.methods.view import LayerView

ALIGNMENT = Registry("alignment")


@ALIGNMENT.register("weight_matching", paper="2209.04836")
def weight_matching(view: LayerView, reference: int, expert: int) -> torch.Tensor | None:
    """Return the permutation int [F] of an expert's neurons that fits the reference best: one exact assignment.

    It maximises the inner product of all weights that belong to a neuron: rows of gate and up, columns of down, and
    their biases, gate and up under one permutation (M-SMoE, section 3.1; Git Re-Basin, section 3.2, one layer).
    """
    return best_permutation(view.experts.expert(reference), view.experts.expert(expert))


@ALIGNMENT.register("none")
def none(view: LayerView, reference: int, expert: int) -> torch.Tensor | None:
    """Return None: the neurons stay in their order (the paper's ablation)."""
    return None


def best_permutation(reference: Expert, expert: Expert) -> torch.Tensor:
    """Return the permutation int [F] of the neurons of `expert` with the largest inner product with `reference`."""
    return assigned(matching_cost(reference, expert))


def matching_cost(reference: Expert, expert: Expert) -> torch.Tensor:
    """Return the negative inner products of the weights of all pairs of neurons, float32 [F, F], summed in place."""
    width, device = reference["up"].shape[0], reference["up"].device
    cost = torch.zeros(width, width, device=device)
    for role, axis in HIDDEN_AXES.items():
        if role in reference and axis is not None:
            rows = [side[role].float().movedim(axis, 0).reshape(width, -1) for side in (reference, expert)]
            cost.addmm_(rows[0], rows[1].T, alpha=-1)
    return cost
