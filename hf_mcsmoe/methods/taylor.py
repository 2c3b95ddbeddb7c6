"""What the loss would change by, to first order, if an expert's weights were zero."""

import torch

from hf_mcsmoe.methods.routed import Routed
from hf_mcsmoe.methods.saliency import SALIENCY
from hf_mcsmoe.methods.statistics import STATISTICS
from hf_mcsmoe.methods.view import LayerView


@STATISTICS.register("taylor", gradients=True, axes="E")
def weights_times_gradients(routed: Routed) -> torch.Tensor:
    """Return `sum |w dL/dw|` over the weights w of each expert for the loss L of the batch, float64 [E]."""
    sums = []
    for number in range(routed.num_experts):
        weights, gradients = routed.experts.expert(number), routed.experts.gradient(number)
        parts = [(weights[role].double() * gradients[role].double()).abs().sum() for role in weights]
        sums.append(torch.stack(parts).sum())
    return torch.stack(sums)


@SALIENCY.register("taylor", paper="1611.06440", needs=["taylor"])
def taylor(view: LayerView) -> torch.Tensor:
    """Return `sum |w dL/dw|` over an expert's weights, added over batches, float64 [E]."""
    return view.sums["taylor"]
