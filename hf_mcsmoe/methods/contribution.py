"""What experts contribute to the output of their layer: the norms of their outputs times the gates."""

import torch

from hf_mcsmoe.methods.saliency import SALIENCY
from hf_mcsmoe.methods.statistics import STATISTICS
from hf_mcsmoe.methods.view import LayerView, Routed

# Of an expert's tokens in a forward every 16th is computed once more, or more often where that were fewer than 8.
EVERY, LEAST = 16, 8


@STATISTICS.register("contribution", axes="E")
def gated_norms(routed: Routed) -> torch.Tensor:
    """Return the sum of `g |f(x)|` over the tokens x that reached each expert f with gate g, float64 [E].

    The norms are those of a sample: the mean norm, weighted by the gates, of the tokens that are computed, times the
    sum of the gates of all. So the pass stays about as fast as a plain forward.
    """
    sums = []
    for expert in range(routed.num_experts):
        outputs, weights = routed.outputs_of(expert, every=EVERY, least=LEAST)
        gates = weights.double().abs()
        mean = (outputs.double().norm(dim=-1) * gates).sum() / gates.sum().clamp(min=torch.finfo(torch.float64).tiny)
        sums.append(mean * _gate_sum(routed, expert))
    return torch.stack(sums)


def _gate_sum(routed: Routed, expert: int) -> torch.Tensor:
    return routed.weights[routed.reached & (routed.index == expert)].double().abs().sum()


@SALIENCY.register("contribution", needs=["contribution", "counts"])
def contribution(view: LayerView) -> torch.Tensor:
    """Return `sum g |f(x)|` over an expert's tokens, float64 [E]: what the layer's output loses without it."""
    return view.sums["contribution"]


@SALIENCY.register("reap", paper="2510.13999", needs=["contribution", "counts"])
def reap(view: LayerView) -> torch.Tensor:
    """Return the mean of `g |f(x)|` over an expert's tokens, float64 [E] (REAP); 0 where none reached it."""
    return view.sums["contribution"] / view.sums.counts.clamp(min=1)
