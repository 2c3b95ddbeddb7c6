"""How much an expert matters: saliency [E] of the experts of a layer. One method, one function."""

import torch

from hf_mcsmoe.methods.registry import Registry
from hf_mcsmoe.methods.view import LayerView

SALIENCY = Registry("saliency")


@SALIENCY.register("frequency", paper="2310.01334", needs=["counts", "tokens"])
def frequency(view: LayerView) -> torch.Tensor:
    """Return the share of tokens routed to each expert, float64 [E] (M-SMoE, section 3.1)."""
    return view.sums.frequency


@SALIENCY.register("gate", paper="2310.01334", needs=["gate_sum", "tokens"])
def gate(view: LayerView) -> torch.Tensor:
    """Return the routing weight that each expert received per token of the layer, float64 [E]."""
    return view.sums["gate_sum"] / view.sums.tokens.clamp(min=1)


@SALIENCY.register("random", paper="2310.01334")
def random(view: LayerView) -> torch.Tensor:
    """Return random numbers in [0, 1), float64 [E]: the control; layers of one number of experts have the same."""
    generator = torch.Generator().manual_seed(view.seed)
    return torch.rand(view.num_experts, generator=generator, dtype=torch.float64)
