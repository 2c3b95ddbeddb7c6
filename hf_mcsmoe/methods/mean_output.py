"""Mean outputs of the experts over the tokens that reached them, and how alike two experts are by them."""

import torch

from hf_mcsmoe.methods.routed import Routed
from hf_mcsmoe.methods.similarity import SIMILARITY, cosines
from hf_mcsmoe.methods.statistics import STATISTICS
from hf_mcsmoe.methods.view import LayerView


@STATISTICS.register("output_sum", axes="ED", signed=True, products=True)
def output_sum(routed: Routed) -> torch.Tensor:
    """Return the sum of each expert's outputs, without gates, over the tokens that reached it, float64 [E, D]."""
    return torch.stack([routed.outputs_of(e)[0].sum(0, dtype=torch.float64) for e in range(routed.num_experts)])


def mean_outputs(view: LayerView) -> torch.Tensor:
    """Return each expert's mean output over the tokens that reached it, float64 [E, D]; zeros where none did."""
    return view.sums["output_sum"] / view.sums.counts.clamp(min=1)[:, None]


@SIMILARITY.register("mean_output", needs=["output_sum", "counts"])
def mean_output(view: LayerView) -> torch.Tensor:
    """Return the cosine of the experts' mean outputs, float64 [E, E]; an expert that no token reached is like none."""
    means = mean_outputs(view)
    return cosines(means @ means.T)
