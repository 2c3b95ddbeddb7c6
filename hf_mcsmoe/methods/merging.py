"""Making one expert out of the aligned members of a group."""

from collections.abc import Callable

import torch

from hf_mcsmoe.methods.experts import Expert, permute
from hf_mcsmoe.methods.registry import Registry
from hf_mcsmoe.methods.view import LayerView

MERGING = Registry("merging")
Merging = Callable[[LayerView, list[int], list[float], list[torch.Tensor | None]], Expert]


def merge_group(
    merge: Merging, view: LayerView, members: list[int], shares: list[float], permutations: list[torch.Tensor | None]
) -> Expert:
    """Return what a method makes of a group's members, without those of weight 0; a single one stays as it is."""
    counted = [place for place, share in enumerate(shares) if share != 0]
    if len(counted) == 1 and permutations[counted[0]] is None:
        return view.experts.expert(members[counted[0]])
    orders = [permutations[place] for place in counted]
    return merge(view, [members[place] for place in counted], [shares[place] for place in counted], orders)


@MERGING.register("average", paper="2310.01334")
def average(
    view: LayerView, members: list[int], shares: list[float], permutations: list[torch.Tensor | None]
) -> Expert:
    """Return the weighted sum of a group's experts, accumulated in float32 (float64 stays float64).

    Args:
        members: indices of the group's experts.
        shares: their weights, summing to 1.
        permutations: int [F] per member, or None to leave its neurons in place.
    """
    if len(members) == 1 and permutations[0] is None:
        return view.experts.expert(members[0])
    total: Expert = {}
    for member, share, permutation in zip(members, shares, permutations, strict=True):
        if share == 0:
            continue
        expert = view.experts.expert(member)
        expert = expert if permutation is None else permute(expert, permutation)
        for role, tensor in expert.items():
            wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
            total[role] = total[role].add_(wide, alpha=share) if role in total else wide * share
    return total
