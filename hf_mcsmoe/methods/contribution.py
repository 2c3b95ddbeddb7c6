"""What experts contribute to the output of their layer: the norms of their outputs times the gates."""

import torch

from hf_mcsmoe.methods.routed import Routed
from hf_mcsmoe.methods.saliency import SALIENCY
from hf_mcsmoe.methods.statistics import STATISTICS
from hf_mcsmoe.methods.view import LayerView


@STATISTICS.register("contribution", axes="E", products=True)
def gated_norms(routed: Routed) -> torch.Tensor:
    """Return the sum of `g |f(x)|` over the tokens x that reached each expert f with gate g, float64 [E]."""
    sums = []
    for expert in range(routed.num_experts):
        outputs, weights = routed.outputs_of(expert)
        sums.append((outputs.double().norm(dim=-1) * weights.double().abs()).sum())
    return torch.stack(sums)


@STATISTICS.register("output_norms", axes="E", products=True)
def output_norms(routed: Routed) -> torch.Tensor:
    """Return the sum of `|f(x)|` over the tokens x that reached each expert f, whatever their gates, float64 [E]."""
    outputs = (routed.outputs_of(expert)[0] for expert in range(routed.num_experts))
    return torch.stack([of_expert.double().norm(dim=-1).sum() for of_expert in outputs])


@SALIENCY.register("contribution", needs=["contribution"])
def contribution(view: LayerView) -> torch.Tensor:
    """Return `sum g |f(x)|` over an expert's tokens, float64 [E]: what the layer's output loses without it."""
    return view.sums["contribution"]


@SALIENCY.register("reap", paper="2510.13999", needs=["contribution", "counts"])
def reap(view: LayerView) -> torch.Tensor:
    """Return the mean of `g |f(x)|` over an expert's tokens, float64 [E] (REAP); 0 where none reached it."""
    return view.sums["contribution"] / view.sums.counts.clamp(min=1)


@SALIENCY.register("ean", paper="2510.13999", needs=["output_norms"])
def ean(view: LayerView) -> torch.Tensor:
    """Return `sum |f(x)|` over an expert's tokens, without gates, float64 [E] (REAP, ablations: activation norm)."""
    return view.sums["output_norms"]


@SALIENCY.register("man", paper="2510.13999", needs=["output_norms", "counts"])
def man(view: LayerView) -> torch.Tensor:
    """Return the mean of `|f(x)|` over an expert's tokens, without gates, float64 [E]; 0 where none reached it."""
    return view.sums["output_norms"] / view.sums.counts.clamp(min=1)
