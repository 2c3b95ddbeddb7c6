"""The weights of the members of a group in the average that they become."""

import torch

from hf_mcsmoe.methods.grouping import Groups
from hf_mcsmoe.methods.registry import Registry
from hf_mcsmoe.methods.view import LayerView

WEIGHTING = Registry("weighting")


def normalised(values: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Return `values` [E] divided by their sum over each group; a group that sums to 0 is averaged uniformly."""
    members = torch.tensor(groups.expert_map)
    sums = torch.zeros(len(groups.dominant), dtype=torch.float64).index_add_(0, members, values.double())
    sizes = torch.bincount(members).double()
    empty = (sums <= 0)[members]
    return torch.where(empty, 1 / sizes[members], values.double() / sums[members].masked_fill(empty, 1))


@WEIGHTING.register("saliency", paper="2310.01334")
def by_saliency(view: LayerView, saliency: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Return weights [E] proportional to saliency (M-SMoE, section 3.1: `sum a_i E_i / sum a_i`); below 0 it is 0."""
    return normalised(saliency.clamp(min=0), groups)


@WEIGHTING.register("uniform", paper="2310.01334")
def uniform(view: LayerView, saliency: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Return equal weights [E] within each group."""
    return normalised(torch.ones(len(saliency)), groups)


@WEIGHTING.register("dominant")
def dominant(view: LayerView, saliency: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Return weight 1 for each dominant expert and 0 for the others: prunes them, their tokens go to the dominant."""
    weights = torch.zeros(len(saliency), dtype=torch.float64)
    weights[groups.dominant] = 1
    return weights


@WEIGHTING.register("reversed", paper="2310.01334")
def reversed_saliency(view: LayerView, saliency: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Return weights [E] proportional to 1 less an expert's share of the layer's saliency (the authors' code)."""
    shares = saliency.double()
    return normalised(1 - shares / shares.sum().clamp(min=torch.finfo(shares.dtype).tiny), groups)


@WEIGHTING.register("random", paper="2310.01334")
def random_weights(view: LayerView, saliency: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Return random weights [E], each uniform before they are scaled: the control of the authors' code."""
    generator = torch.Generator().manual_seed(view.seed)
    return normalised(torch.rand(len(saliency), generator=generator, dtype=torch.float64), groups)
