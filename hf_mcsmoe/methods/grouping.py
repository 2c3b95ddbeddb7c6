"""Which experts of a layer become one: groups around dominant experts."""

from dataclasses import dataclass

import torch

from hf_mcsmoe.methods.budget import salient_first
from hf_mcsmoe.methods.registry import Registry

GROUPING = Registry("grouping")


@dataclass(frozen=True)
class Groups:
    """Groups of one layer: `expert_map` int [E] -> [G], and the dominant expert of each group, int [G]."""

    expert_map: list[int]
    dominant: list[int]


@GROUPING.register("dominant", paper="2310.01334")
def dominant_groups(saliency: torch.Tensor, similarity: torch.Tensor, num_groups: int) -> Groups:
    """Let each expert join the most similar of the `num_groups` most salient ones (M-SMoE, section 3.1).

    Args:
        saliency: [E].
        similarity: [E, E].
        num_groups: G. Groups are numbered by the index of their dominant expert; a tie joins the lower number.
    """
    dominant = sorted(salient_first(saliency)[:num_groups])
    expert_map = similarity[:, dominant].argmax(1)  # [E]; argmax takes the first of equals
    expert_map[dominant] = torch.arange(num_groups)
    return Groups(expert_map.tolist(), dominant)
