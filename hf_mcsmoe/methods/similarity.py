"""How alike two experts are: similarity [E, E] of the experts of a layer. One method, one function."""

import torch

from hf_mcsmoe.methods.registry import Registry
from hf_mcsmoe.methods.view import LayerView

SIMILARITY = Registry("similarity")


@SIMILARITY.register("router_logits", paper="2310.01334", needs=["logit_gram"])
def router_logits(view: LayerView) -> torch.Tensor:
    """Return the cosine of the experts' router logits over all tokens, float64 [E, E] (M-SMoE, section 3.1).

    The Gram matrix holds all of it: `cos(H_i, H_j) = G_ij / sqrt(G_ii G_jj)`. An expert without logits is like none.
    """
    return cosines(view.sums["logit_gram"])


@SIMILARITY.register("random", paper="2310.01334")
def random(view: LayerView) -> torch.Tensor:
    """Return a random symmetric matrix, float64 [E, E]: the control of the paper's ablation."""
    generator = torch.Generator().manual_seed(view.seed)
    values = torch.rand(view.num_experts, view.num_experts, generator=generator, dtype=torch.float64)
    return values + values.T


def cosines(gram: torch.Tensor) -> torch.Tensor:
    """Return `G_ij / sqrt(G_ii G_jj)` of a Gram matrix [E, E]; 0 for rows of zeros."""
    norms = gram.diagonal().clamp(min=0).sqrt()
    return torch.nan_to_num(gram / norms[:, None] / norms[None, :])
