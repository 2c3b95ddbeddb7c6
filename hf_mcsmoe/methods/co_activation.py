"""Experts that the same tokens pick: how often, and how alike two experts are by it."""

import torch

from hf_mcsmoe.methods.routed import Routed
from hf_mcsmoe.methods.similarity import SIMILARITY, cosines
from hf_mcsmoe.methods.statistics import STATISTICS
from hf_mcsmoe.methods.view import LayerView


@STATISTICS.register("co_activation", axes="EE")
def co_activation(routed: Routed) -> torch.Tensor:
    """Return the number of tokens that reached both of two experts, int64 [E, E]; on the diagonal, those of each."""
    tokens = torch.zeros(len(routed.index), routed.num_experts + 1, device=routed.index.device)
    tokens.scatter_(1, routed.index.masked_fill(~routed.reached, routed.num_experts), 1)
    tokens = tokens[:, :-1].double()
    return (tokens.mT @ tokens).long()


@SIMILARITY.register("co_activation", needs=["co_activation"])
def co_activation_cosine(view: LayerView) -> torch.Tensor:
    """Return `c_ij / sqrt(c_i c_j)` of the tokens c_ij that reached both of two experts, float64 [E, E].

    The cosine of the experts as vectors of ones and zeros over the tokens. It is 0 where top-1 routers never pick two.
    """
    return cosines(view.sums["co_activation"].double())
