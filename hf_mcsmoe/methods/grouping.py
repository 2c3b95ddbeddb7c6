"""Which experts of a layer become one: groups around dominant experts."""

from dataclasses import dataclass

import torch

from hf_mcsmoe.methods.budget import salient_first
from hf_mcsmoe.methods.registry import Registry
from hf_mcsmoe.methods.view import LayerView

GROUPING = Registry("grouping")


@dataclass(frozen=True)
class Groups:
    """Groups of one layer: `expert_map` int [E] -> [G], and the dominant expert of each group, int [G]."""

    expert_map: list[int]
    dominant: list[int]


@GROUPING.register("dominant", paper="2310.01334")
def dominant_groups(view: LayerView, saliency: torch.Tensor, similarity: torch.Tensor, groups: int) -> Groups:
    """Let each expert join the most similar of the `groups` most salient ones (M-SMoE, section 3.1).

    Args:
        saliency: [E].
        similarity: [E, E].
        groups: G. They are numbered by the index of their dominant expert; a tie joins the lower number.
    """
    dominant = sorted(salient_first(saliency)[:groups])
    expert_map = similarity[:, dominant].argmax(1)  # [E]; argmax takes the first of equals
    expert_map[dominant] = torch.arange(groups)
    return Groups(expert_map.tolist(), dominant)
