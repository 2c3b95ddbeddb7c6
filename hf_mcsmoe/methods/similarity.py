"""How alike two experts are: similarity [E, E] from the statistics of their layer. One method, one function."""

import torch

from hf_mcsmoe.methods.registry import Registry
from hf_mcsmoe.methods.statistics import LayerStatistics

SIMILARITY = Registry("similarity")


@SIMILARITY.register("router_logits", paper="2310.01334")
def router_logits(statistics: LayerStatistics, seed: int) -> torch.Tensor:
    """Return the cosine of the experts' router logits over all tokens, float64 [E, E] (M-SMoE, section 3.1).

    The Gram matrix holds all of it: `cos(H_i, H_j) = G_ij / sqrt(G_ii G_jj)`. An expert without logits is like none.
    """
    norms = statistics.logit_gram.diagonal().clamp(min=0).sqrt()
    return torch.nan_to_num(statistics.logit_gram / norms[:, None] / norms[None, :])


@SIMILARITY.register("random", paper="2310.01334")
def random(statistics: LayerStatistics, seed: int) -> torch.Tensor:
    """Return a random symmetric matrix, float64 [E, E]: the control of the paper's ablation."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(statistics.num_experts, statistics.num_experts, generator=generator, dtype=torch.float64)
    return values + values.T
