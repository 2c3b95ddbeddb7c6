"""Mean outputs of the experts over the tokens that reached them: how alike experts are by them, and how they vary."""

import torch

from hf_mcsmoe.methods.routed import Routed
from hf_mcsmoe.methods.saliency import SALIENCY
from hf_mcsmoe.methods.similarity import SIMILARITY, cosines
from hf_mcsmoe.methods.statistics import STATISTICS
from hf_mcsmoe.methods.view import LayerView


@STATISTICS.register("output_sum", axes="ED", signed=True, products=True)
def output_sum(routed: Routed) -> torch.Tensor:
    """Return the sum of each expert's outputs, without gates, over the tokens that reached it, float64 [E, D]."""
    return torch.stack([routed.outputs_of(e)[0].sum(0, dtype=torch.float64) for e in range(routed.num_experts)])


@STATISTICS.register("output_squares", axes="E", products=True)
def output_squares(routed: Routed) -> torch.Tensor:
    """Return the sum of `|f(x)|^2` over the tokens x that reached each expert f, without gates, float64 [E]."""
    return torch.stack([routed.outputs_of(e)[0].double().square().sum() for e in range(routed.num_experts)])


def mean_outputs(view: LayerView) -> torch.Tensor:
    """Return each expert's mean output over the tokens that reached it, float64 [E, D]; zeros where none did."""
    return view.sums["output_sum"] / view.sums.counts.clamp(min=1)[:, None]


@SIMILARITY.register("mean_output", needs=["output_sum", "counts"])
def mean_output(view: LayerView) -> torch.Tensor:
    """Return the cosine of the experts' mean outputs, float64 [E, E]; an expert that no token reached is like none."""
    means = mean_outputs(view)
    return cosines(means @ means.T)


@SALIENCY.register(
    "fluctuation", paper="2507.00390", needs=["output_sum", "output_squares", "counts", "gate_sum", "tokens"]
)
def fluctuation(view: LayerView) -> torch.Tensor:
    """Return the deviation of an expert's outputs from their mean times its gates per token, float64 [E] (MoNE).

    The root of the variance, of all entries together: what a constant in the expert's place would miss. One that at
    most one token reached varies nothing.
    """
    counts = view.sums.counts.double()
    missed = view.sums["output_squares"] - view.sums["output_sum"].square().sum(1) / counts.clamp(min=1)
    deviation = (missed.clamp(min=0) / (counts - 1).clamp(min=1)).sqrt()
    return deviation * view.sums["gate_sum"] / view.sums.tokens.clamp(min=1)
