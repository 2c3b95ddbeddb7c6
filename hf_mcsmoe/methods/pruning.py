"""Which experts a pruned layer keeps."""

import torch

from hf_mcsmoe.methods.registry import Registry
from hf_mcsmoe.methods.view import LayerView

SELECTION = Registry("selection")


@SELECTION.register("salient")
def salient(view: LayerView, saliency: torch.Tensor, count: int, groups: int) -> list[int]:
    """Return the `count` most salient experts, rising; of a router with groups as many of each."""
    return sorted(keeping_order(saliency, groups)[: count // groups].flatten().tolist())


def keeping_order(saliency: torch.Tensor, groups: int) -> torch.Tensor:
    """Return the experts in the order in which they stay, int [E / groups, groups]: a row is one of each group.

    Row j holds the j-th most salient expert of each of the router's groups, of which equally many must stay.

    Args:
        saliency: [E].
        groups: how many groups the router has, one after the other; 1 where it has none.
    """
    scores = saliency.view(groups, -1)
    ranked = scores.argsort(dim=1, descending=True, stable=True)  # [groups, E / groups]
    return (ranked + torch.arange(groups)[:, None] * scores.shape[1]).T
