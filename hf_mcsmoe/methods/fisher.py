"""Empirical Fisher information: squared gradients of the loss, by which experts, or their hidden units, are weighted.

Of M-SMoE's ablation. The released code has a weight for each entry of a matrix, which takes a second copy of all
experts; here there is one for an expert, and one for a hidden unit. Published for one text a batch: of several texts
in a batch the square is that of their mean gradient.
"""

import torch

from hf_mcsmoe.methods.experts import HIDDEN_AXES, Expert, permute
from hf_mcsmoe.methods.grouping import Groups
from hf_mcsmoe.methods.merging import MERGING
from hf_mcsmoe.methods.routed import Routed
from hf_mcsmoe.methods.statistics import STATISTICS
from hf_mcsmoe.methods.units import units_of
from hf_mcsmoe.methods.view import LayerView
from hf_mcsmoe.methods.weighting import WEIGHTING, normalised


@STATISTICS.register("fisher", gradients=True, axes="E")
def squared_gradients(routed: Routed) -> torch.Tensor:
    """Return `sum (dL/dw)^2` over the weights w of each expert for the loss L of the batch, float64 [E]."""
    found = [routed.experts.gradient(expert).values() for expert in range(routed.num_experts)]
    return torch.stack([torch.stack([part.double().square().sum() for part in parts]).sum() for parts in found])


@STATISTICS.register("unit_fisher", gradients=True, axes="EF")
def squared_gradients_of_units(routed: Routed) -> torch.Tensor:
    """Return `sum (dL/dw)^2` over the weights w of each hidden unit for the loss L of the batch, float64 [E, F]."""
    found = []
    for expert in range(routed.num_experts):
        rows = [
            part.double().flatten(1) if part.ndim > 1 else part.double()[:, None] for part in _units(routed, expert)
        ]
        found.append(torch.cat(rows, 1).square().sum(1))
    return torch.stack(found)


def _units(routed: Routed, expert: int) -> list[torch.Tensor]:
    return list(units_of(routed.experts.gradient(expert)).values())


@WEIGHTING.register("fisher", paper="2111.09832", needs=["fisher"])
def fisher(view: LayerView, saliency: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Return weights [E] proportional to an expert's empirical Fisher information, the sum over its weights."""
    return normalised(view.sums["fisher"], groups)


@MERGING.register("fisher", paper="2111.09832", needs=["unit_fisher"])
def fisher_average(
    view: LayerView, members: list[int], shares: list[float], permutations: list[torch.Tensor | None]
) -> Expert:
    """Return the members' average in which each hidden unit is weighted by its own Fisher information.

    The shares count for the bias of the output alone, and for units that no member has a gradient at. How often an
    expert is used is in the information already.
    """
    orders = dict(zip(members, permutations, strict=True))
    experts, weights = [], []
    for member, order in orders.items():
        expert, information = view.experts.expert(member), view.sums["unit_fisher"][member]
        experts.append(expert if order is None else permute(expert, order))
        weights.append(information if order is None else information[order])
    each = torch.stack(weights)  # [n, F]
    known = each.sum(0)
    each = torch.where(known > 0, each / known.clamp(min=torch.finfo(each.dtype).tiny), torch.tensor(shares)[:, None])
    axes = {role: HIDDEN_AXES[role] for role in experts[0]}
    return {role: _weighted([one[role] for one in experts], each, shares, axis) for role, axis in axes.items()}


def _weighted(tensors: list[torch.Tensor], each: torch.Tensor, shares: list[float], axis: int | None) -> torch.Tensor:
    """Return the mean of tensors, weighted along `axis` by each [n, F], or by shares without one."""
    total = torch.zeros_like(tensors[0], dtype=torch.promote_types(tensors[0].dtype, torch.float32))
    for tensor, weights, share in zip(tensors, each, shares, strict=True):
        rows = tensor.to(total)
        total += rows * share if axis is None else (rows.movedim(axis, -1) * weights.to(total)).movedim(-1, axis)
    return total
