"""Making one expert of a group: the weights of its members, and their average."""

import torch

from hf_mcsmoe.experts import ExpertWeights, permute
from hf_mcsmoe.grouping import Groups
from hf_mcsmoe.registry import Registry

MERGING = Registry("merging")


def _normalised(values: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Return `values` [E] divided by their sum over each group; a group that sums to 0 is averaged uniformly."""
    members = torch.tensor(groups.expert_map)
    sums = torch.zeros(len(groups.dominant), dtype=torch.float64).index_add_(0, members, values.double())
    sizes = torch.bincount(members).double()
    empty = (sums <= 0)[members]
    return torch.where(empty, 1 / sizes[members], values.double() / sums[members].masked_fill(empty, 1))


@MERGING.register("frequency", paper="2310.01334")
def frequency(saliency: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Return weights [E] proportional to saliency (M-SMoE, section 3.1: `sum a_i E_i / sum a_i`)."""
    return _normalised(saliency, groups)


@MERGING.register("uniform", paper="2310.01334")
def uniform(saliency: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Return equal weights [E] within each group."""
    return _normalised(torch.ones(len(saliency)), groups)


@MERGING.register("dominant")
def dominant(saliency: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Return weight 1 for each dominant expert and 0 for the others: prunes them, their tokens go to the dominant."""
    weights = torch.zeros(len(saliency), dtype=torch.float64)
    weights[groups.dominant] = 1
    return weights


def merge_group(
    weights: ExpertWeights,
    members: list[int],
    shares: list[float],
    permutations: list[torch.Tensor | None],
) -> dict[str, torch.Tensor]:
    """Return the weighted sum of a group's experts, accumulated in float32 (float64 stays float64).

    Args:
        weights: the experts of the layer.
        members: indices of the group's experts.
        shares: their weights, summing to 1.
        permutations: int [F] per member, or None to leave its neurons in place.
    """
    if len(members) == 1 and permutations[0] is None:
        return weights.expert(members[0])
    total: dict[str, torch.Tensor] = {}
    for member, share, permutation in zip(members, shares, permutations, strict=True):
        if share == 0:
            continue
        expert = weights.expert(member)
        expert = expert if permutation is None else permute(expert, permutation)
        for role, tensor in expert.items():
            wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
            total[role] = total[role].add_(wide, alpha=share) if role in total else wide * share
    return total
